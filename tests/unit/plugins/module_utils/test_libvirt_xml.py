# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""libvirt's XML: new host devices, and domains moved to iommufd, held against libvirt's own schema where it is here."""

from __future__ import annotations

import dataclasses
import re
import typing as t
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.iommufd.host.plugins.module_utils._backend import Facts, PeerToPeer
from ansible_collections.iommufd.host.plugins.module_utils._errors import OptionError
from ansible_collections.iommufd.host.plugins.module_utils._guest_devices import parse_devices
from ansible_collections.iommufd.host.plugins.module_utils._libvirt_xml import convert, hostdevs
from ansible_collections.iommufd.host.tests.unit.conftest import shared_data
from ansible_collections.iommufd.host.tests.unit.relaxng import Schema

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"

FORKY = Facts(
    architecture="x86_64", kernel="7.2.13", iommufd=True, cdev=True, groups=True, qemu="/usr/bin/qemu (11.1.3)",
    qemu_iommufd=True, qemu_passing=True, libvirt="12.8.0", libvirt_passes=True,
    peer_to_peer=PeerToPeer(True, "4 BARs were mapped"),
)  # fmt: skip
NO_PEERS = dataclasses.replace(FORKY, peer_to_peer=PeerToPeer(False, "the kernel refused to map 4 BARs"))
TRIXIE = dataclasses.replace(NO_PEERS, kernel="6.12.95", libvirt="11.3.0", libvirt_passes=False)


@pytest.fixture(scope="module")
def schema() -> Schema:
    """libvirt's schema of a domain; skips where the data of others is not here."""
    if not shared_data().is_dir():
        pytest.skip("libvirt's schemas are not there; set IOMMUFD_HOST_SHARED")
    return Schema(shared_data() / "libvirt-schema" / "domain.rng")


def domain(devices: str, before: str = "") -> str:
    return (
        "<domain type='kvm'>\n  <name>web1</name>\n  <memory unit='GiB'>4</memory>\n"
        "  <os>\n    <type arch='x86_64' machine='pc-q35-10.0'>hvm</type>\n  </os>\n"
        f"{before}  <devices>\n{devices}\n  </devices>\n</domain>\n"
    )


def hostdev(address: str = "0000:01:00.0", driver: str = "", indent: str = "    ") -> str:
    domain_, bus, rest = address.split(":")
    slot, function = rest.split(".")
    lines = ["<hostdev mode='subsystem' type='pci' managed='yes'>"]
    lines += [f"  {driver}"] if driver else []
    lines += [
        "  <source>",
        f"    <address domain='0x{domain_}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'/>",
        "  </source>",
        "  <alias name='ua-first'/>",
        "</hostdev>",
    ]
    return "\n".join(indent + line for line in lines)


MDEV = (
    "    <hostdev mode='subsystem' type='mdev' managed='no' model='vfio-pci' display='off'>\n      <source>\n"
    f"        <address uuid='{UUID}'/>\n      </source>\n    </hostdev>"
)


# -- the schema itself -------------------------------------------------------------------------------------------------


def test_the_schema_tells_right_from_wrong(schema: Schema) -> None:
    """Without this, a schema that takes everything, or a validator that sees nothing, would pass for a proof."""
    good = domain(hostdev(driver="<driver name='vfio' iommufd='yes'/>"))
    assert schema.errors(good) == []
    for old, new in (
        ("iommufd='yes'", "iommufd='maybe'"),
        ("iommufd='yes'", "iommufs='yes'"),
        ("<source>", "<sauce>"),
        ("bus='0x01'", "bus='0x1ff'"),
        ("  <devices>", "  <iommufd enabled='perhaps'/>\n  <devices>"),
    ):
        wrong = good.replace(old, new).replace("</source>" if new == "<sauce>" else "\0", "</sauce>")
        assert wrong != good
        assert schema.errors(wrong), new


# -- new host devices --------------------------------------------------------------------------------------------------


def make(devices: list[t.Any], *more: t.Any, **options: t.Any) -> list[str]:
    return hostdevs(parse_devices("devices", devices), *more, **options)


def test_a_host_device() -> None:
    assert make(["0000:41:10.2"], "12.8.0") == [
        "<hostdev mode='subsystem' type='pci' managed='no'>\n"
        "  <driver name='vfio' iommufd='yes'/>\n"
        "  <source>\n"
        "    <address domain='0x0000' bus='0x41' slot='0x10' function='0x2'/>\n"
        "  </source>\n"
        "</hostdev>"
    ]
    (legacy,) = make(["0000:41:10.2"], "9.0.0", "legacy")
    assert "<driver name='vfio'/>" in legacy
    assert make(["0000:41:10.2"], None, backend="legacy") == [legacy], "without iommufd the version does not matter"


def test_where_the_domain_says_it() -> None:
    on, off = make(["01:00.0", {"address": "02:00.0", "backend": "legacy"}], "12.2.0", scope="domain")
    assert "<driver name='vfio'/>" in on
    assert "<driver name='vfio' iommufd='no'/>" in off


def test_the_place_in_the_guest() -> None:
    devices = [
        {"address": "0000:01:00.0", "guest_address": "0000:05:00.0"},
        {"address": "0000:01:00.1", "guest_address": "05:00.1"},
        {"address": "0000:02:00.0", "guest_address": "0000:06:00.0"},
    ]
    first, second, third = make(devices, "12.8.0")
    place = "<address type='pci' domain='0x0000' bus='0x{}' slot='0x00' function='0x{}'{}/>"
    assert place.format("05", "0", " multifunction='on'") in first
    assert place.format("05", "1", "") in second
    assert place.format("06", "0", "") in third


def test_mediated_devices_have_no_iommufd_there() -> None:
    pci, ap = make(["01:00.0", {"uuid": UUID, "kind": "vfio-ap"}], "12.8.0")
    assert "iommufd='yes'" in pci
    assert "type='mdev' managed='no' model='vfio-ap'" in ap
    assert "iommufd" not in ap
    with pytest.raises(OptionError, match=r"^devices\[0\]\.backend: 'iommufd' .*no iommufd for mdev"):
        make([{"uuid": UUID, "backend": "iommufd"}], "12.8.0")


@pytest.mark.parametrize(
    ("devices", "more", "option", "words"),
    [
        (["01:00.0"], {"version": "11.3.0"}, "version: '11.3.0'", "libvirt 12.1 or later"),
        (["01:00.0"], {"version": "12.0.0-2"}, "version: '12.0.0-2'", "libvirt 12.1 or later"),
        (["01:00.0"], {"version": "12.1.0", "scope": "domain"}, "version: '12.1.0'", "libvirt 12.2 or later"),
        (["01:00.0"], {"version": None}, "version: None", "virsh version"),
        (["01:00.0"], {"version": "new"}, "version: 'new'", "virsh version"),
        (["01:00.0"], {"version": "12.8.0", "scope": "guest"}, "scope: 'guest'", "device, domain"),
        (["01:00.0"], {"version": "12.8.0", "backend": "auto"}, "backend: 'auto'", "vfio_backend"),
        ([{"address": "01:00.0", "guest_address": "x"}], {"version": "12.8.0"}, r"devices\[0\]\.guest_", "PCI"),
        (
            [{"address": f"0{n}:00.0", "guest_address": "05:00.0"} for n in (1, 2)], {"version": "12.8.0"},
            r"devices\[1\]\.guest_address: ", "devices[0] has it",
        ),
        (
            [{"uuid": UUID, "kind": "vfio-ccw", "guest_address": "05:00.0"}], {"version": "12.8.0"},
            r"devices\[0\]\.guest_address: ", "no PCI device",
        ),
        (
            [{"sysfsdev": "/sys/devices/vfio_ap/matrix/x", "kind": "vfio-ap"}], {"version": "12.8.0"},
            r"devices\[0\]\.sysfsdev: ", "UUID",
        ),
    ],
)  # fmt: skip
def test_what_libvirt_would_not_take(devices: list[t.Any], more: dict[str, t.Any], option: str, words: str) -> None:
    with pytest.raises(OptionError, match=f"^{option}") as error:
        make(devices, **more)
    assert words in error.value.message


EVERYTHING = [
    "0000:01:00.0",
    {"address": "0001:02:00.1", "backend": "legacy", "guest_address": "0000:05:00.0"},
    {"address": "0000:03:1f.7", "guest_address": "0000:05:00.1"},
    UUID,
    {"uuid": UUID.replace("1001", "1002"), "kind": "vfio-ccw"},
    {"uuid": UUID.replace("1001", "1003"), "kind": "vfio-ap"},
]


@pytest.mark.parametrize("backend", ["iommufd", "legacy"])
@pytest.mark.parametrize("scope", ["device", "domain"])
def test_libvirts_schema_takes_all_of_it(schema: Schema, backend: str, scope: str) -> None:
    text = "\n".join(make(EVERYTHING, "12.8.0", backend=backend, scope=scope))
    before = "  <iommufd enabled='yes'/>\n" if scope == "domain" else ""
    assert text.count("<hostdev") == 6
    assert schema.errors(domain(text, before)) == []


# -- domains that are there --------------------------------------------------------------------------------------------


def move(text: str, facts: Facts = FORKY, request: str = "auto", **more: t.Any) -> dict[str, t.Any]:
    return convert("domain", text, facts, request, **more)


def test_a_driver_is_put_in_and_nothing_else_changes() -> None:
    before = domain(hostdev())
    result = move(before)
    assert result["changed"]
    assert result["backend"] == "iommufd"
    assert result["xml"] == domain(hostdev(driver="<driver name='vfio' iommufd='yes'/>"))
    assert result["devices"] == [
        {
            "name": "0000:01:00.0", "kind": "vfio-pci", "element": "hostdev", "before": "legacy", "backend": "iommufd",
            "changed": True, "reason": result["reason"],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("driver", "after"),
    [
        ("<driver name='vfio'/>", "<driver name='vfio' iommufd='yes'/>"),
        ('<driver  name = "vfio" />', '<driver  name = "vfio" iommufd="yes" />'),
        ("<driver name='vfio' model='a>b'/>", "<driver name='vfio' model='a>b' iommufd='yes'/>"),
        ("<driver\n  name='vfio'\n/>", "<driver\n  name='vfio' iommufd='yes'\n/>"),
        ("<driver name='vfio'></driver>", "<driver name='vfio' iommufd='yes'></driver>"),
        ("<driver/>", "<driver iommufd='yes'/>"),
    ],
)  # fmt: skip
def test_a_driver_that_is_there_gets_the_attribute(driver: str, after: str) -> None:
    assert move(domain(hostdev(driver=driver)))["xml"] == domain(hostdev(driver=after))


WILD = """<?xml version='1.0' encoding='UTF-8'?>
<!-- WARNING: <hostdev> in a comment, with 'quotes" and ümlauts -->
<domain xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0" type='kvm'   >
\t<name>wëb1</name><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
  <metadata><x:y xmlns:x="urn:x"><hostdev mode='subsystem' type='pci'/><![CDATA[<hostdev>]]>  </x:y></metadata>
  <memory>1048576</memory>
  <os><type arch="x86_64" machine="q35">hvm</type></os>
  <future-element  a = 'b>c'  />
  <devices>
    <!-- the card --> <hostdev type="pci" managed="no" mode="subsystem"><source><address bus='1' slot='0' function='0x0'
        domain='0'/></source></hostdev>
\t<interface type='hostdev' managed='yes'>\r
\t\t<mac address='52:54:00:6d:90:02'/>\r
\t\t<source><address type='pci' domain='0x0000' bus='0x41' slot='0x10' function='0x3'/></source>\r
\t</interface>
    <hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0xbeef'/></source></hostdev>
  </devices>
</domain>
<!-- the end -->
"""


def test_what_is_not_ours_stays_byte_for_byte() -> None:
    result = move(WILD)
    assert [row["name"] for row in result["devices"]] == ["0000:01:00.0", "0000:41:10.3"]
    assert [row["element"] for row in result["devices"]] == ["hostdev", "interface"]
    expected = WILD.replace(
        '<hostdev type="pci" managed="no" mode="subsystem"><source>',
        '<hostdev type="pci" managed="no" mode="subsystem"><driver name=\'vfio\' iommufd=\'yes\'/><source>',
    ).replace("\t\t<mac ", "\t\t<driver name='vfio' iommufd='yes'/>\n\t\t<mac ")
    assert result["xml"] == expected
    assert move(result["xml"])["xml"] == result["xml"], "a second time there is nothing to do"
    assert not move(result["xml"])["changed"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([hostdev(), hostdev("0000:02:00.0", "<driver name='vfio'/>"), MDEV, "    <!-- é -->",
                              "    <video><model type='none'/></video>", " <x a='>'/>", "\r\n"]), max_size=8),
    st.sampled_from(["", "  <iommufd enabled='no'/>\n", "<iommufd enabled=\"yes\"/>"]),
    st.sampled_from(["device", "domain"]),
)  # fmt: skip
def test_taking_out_what_was_put_in_gives_the_text_of_before(parts: list[str], before: str, scope: str) -> None:
    text = domain("\n".join(parts), before)
    result = move(text, request="iommufd", scope=scope, backends={UUID: "legacy"} if MDEV in parts else {})

    def without(words: str) -> str:
        words = re.sub(r"<driver name='vfio'( iommufd='(yes|no)')?/>\s*", "", words)
        return re.sub(r"<iommufd [^>]*/>\s*", "", words)

    assert without(result["xml"]) == without(text)
    assert ET.fromstring(result["xml"]).tag == "domain"
    assert result["reason"]


def test_the_domain_says_it_for_all() -> None:
    text = domain("\n".join([hostdev(), hostdev("0000:02:00.0", "<driver name='vfio' iommufd='no'/>"), MDEV]))
    result = move(text, request="iommufd", scope="domain", backends={UUID: "legacy"})
    assert "  <iommufd enabled='yes'/>\n  <devices>\n" in result["xml"]
    assert result["xml"].replace("  <iommufd enabled='yes'/>\n", "") == text, "what says no stays with that"
    assert [row["backend"] for row in result["devices"]] == ["iommufd", "legacy", "legacy"]
    assert result["mixed"]
    single = move(
        domain("\n".join([hostdev(), hostdev("0000:02:00.0")])), scope="domain", backends={"0000:02:00.0": "legacy"}
    )
    assert single["xml"].count("<driver name='vfio' iommufd='no'/>") == 1
    off = move(domain(hostdev(), '  <iommufd enabled="no"/>\n'), scope="domain")
    assert off["xml"] == domain(hostdev(), '  <iommufd enabled="yes"/>\n')


def test_a_domain_that_is_on_iommufd_already() -> None:
    text = domain(hostdev(), "  <iommufd enabled='yes'/>\n")
    result = move(text, NO_PEERS)
    assert (result["changed"], result["xml"]) == (False, text)
    assert result["devices"][0]["before"] == result["devices"][0]["backend"] == "iommufd"
    assert result["devices"][0]["reason"] == "it is on iommufd already"
    assert move(text, TRIXIE, "iommufd")["backend"] == "iommufd", "whatever its libvirt can, it says so already"
    both = domain("\n".join([hostdev(driver="<driver name='vfio' iommufd='yes'/>"), hostdev("0000:02:00.0")]))
    result = move(both, NO_PEERS)
    assert not result["changed"]
    assert "though legacy would be the choice: the guest has 2 PCI devices" in result["devices"][0]["reason"]


@pytest.mark.parametrize(
    ("text", "facts", "more", "reason"),
    [
        (domain(hostdev()), TRIXIE, {}, "libvirt 11.3.0 has no iommufd for host devices (12.1 and later have it)"),
        (domain(hostdev()), TRIXIE, {"request": "iommufd"}, "libvirt 11.3.0 has no iommufd for host devices"),
        (domain(hostdev() + "\n" + hostdev("0000:02:00.0")), NO_PEERS, {}, "the guest has 2 PCI devices, and"),
        (domain(hostdev()), NO_PEERS, {"hot_plug": True}, "further devices may be plugged in"),
        (domain(hostdev() + "\n" + MDEV), FORKY, {}, f"{UUID} is a mdev device, for which libvirt's XML has"),
        (domain(hostdev() + "\n" + MDEV), FORKY, {"request": "iommufd"}, f"{UUID} is a mdev device"),
        (domain(hostdev()).replace("pc-q35-10.0", "pseries-10.0"), FORKY, {}, "spapr"),
        (
            domain(hostdev()).replace("x86_64", "ppc64le"), dataclasses.replace(FORKY, architecture=None), {}, "spapr",
        ),
        (domain(hostdev()), dataclasses.replace(FORKY, libvirt_passes=None), {}, "it is not known whether libvirt"),
        (domain(hostdev()), dataclasses.replace(FORKY, libvirt="12.1.0"), {"scope": "domain"}, "for a whole domain"),
        (domain(hostdev()).replace("type='kvm'", "type='xen'"), FORKY, {}, "a domain of type xen"),
        (domain(""), FORKY, {}, "no host device"),
        (domain("    <hostdev mode='capabilities' type='misc'/>"), FORKY, {}, "no host device"),
    ],
)  # fmt: skip
def test_why_not(text: str, facts: Facts, more: dict[str, t.Any], reason: str) -> None:
    result = move(text, facts, **more)
    assert (result["changed"], result["xml"]) == (False, text)
    assert reason in result["reason"]
    assert "is not accepted" not in result["reason"]
    assert all(row["reason"] and not row["changed"] for row in result["devices"])


def test_a_device_that_says_no_or_has_another_driver_is_left() -> None:
    text = domain(
        "\n".join([hostdev(), hostdev("0000:02:00.0", "<driver name='vfio' iommufd='no'/>"),
                   hostdev("0000:03:00.0", "<driver name='xen'/>")])
    )  # fmt: skip
    result = move(text)
    assert [row["changed"] for row in result["devices"]] == [True, False, False]
    assert result["devices"][2]["reason"] == "its driver is xen, not vfio"
    assert result["mixed"]
    assert any("different backends" in warning for warning in result["warnings"])
    forced = move(text, backends={"02:00.0": "iommufd"})
    assert forced["devices"][1]["changed"]
    assert "iommufd='no'" not in forced["xml"]


def test_a_mix_that_is_asked_for() -> None:
    text = domain(hostdev() + "\n" + MDEV)
    result = move(text, request="iommufd", backends={UUID.upper(): "legacy"})
    assert [row["backend"] for row in result["devices"]] == ["iommufd", "legacy"]
    for wrong, words in (({"0000:09:00.0": "legacy"}, "a device of the domain"), ({UUID: "vfio"}, "legacy, iommufd")):
        with pytest.raises(OptionError, match=r"^backends") as error:
            move(text, backends=wrong)
        assert words in error.value.message


@pytest.mark.parametrize("scope", ["device", "domain"])
def test_libvirts_schema_takes_moved_domains(schema: Schema, scope: str) -> None:
    several = [hostdev(), hostdev("0000:02:00.0", "<driver name='vfio' iommufd='no'/>"), hostdev("0000:03:00.0"), MDEV]
    vf = "<source><address type='pci' bus='0x41' slot='0x10' function='1'/></source>"
    text = domain("\n".join([*several, f"<interface type='hostdev'>{vf}</interface>"]))
    assert schema.errors(text) == []
    result = move(text, scope=scope, request="iommufd", backends={UUID: "legacy", "0000:03:00.0": "legacy"})
    assert [row["changed"] for row in result["devices"]] == [True, False, False, False, True]
    assert schema.errors(result["xml"]) == []


def test_devices_from_elsewhere_are_told() -> None:
    line = (
        "  <qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n"
        "    <qemu:arg value='-device'/>\n    <qemu:arg value='vfio-pci,host=0000:09:00.0'/>\n  </qemu:commandline>\n"
    )
    pool = "    <interface type='network'>\n      <source network='vfs'/>\n    </interface>"
    result = move(domain(hostdev() + "\n" + pool, line), NO_PEERS)
    assert not result["changed"], "the device on the command line counts, too"
    assert "the guest has 2 PCI devices" in result["reason"]
    assert [word for word in result["warnings"] if "qemu:commandline" in word or "the network vfs" in word] == (
        result["warnings"][:2]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "virsh dumpxml"),
        ("", "no element found"),
        ("<domain>", "no element found"),
        ("<network/>", "the outermost element is network"),
        ("<!DOCTYPE domain [<!ENTITY a 'b'>]><domain/>", "document type"),
        (domain("<hostdev mode='subsystem' type='pci'/>"), "a <source> with the PCI address"),
        (
            domain("<hostdev type='pci'><source><address bus='x'/></source></hostdev>"),
            "a <source> with the PCI address",
        ),
        (domain("<hostdev type='mdev' model='vfio-pci'><source/></hostdev>"), "UUID"),
    ],
)
def test_what_is_no_domain(text: t.Any, words: str) -> None:
    with pytest.raises(OptionError, match=r"^domain") as error:
        move(text)
    assert words in error.value.message


def test_it_only_moves_to_iommufd() -> None:
    with pytest.raises(OptionError, match=r"^backend: 'legacy' .*only ever moves devices to iommufd"):
        move(domain(hostdev()), request="legacy")
