# Copyright (c) 2026, the iommufd.host authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A lab host for a long run, and the run's record.

The host is started by the collection's own playbook ``lab`` and destroyed at the end, also after a failure. On it runs
``_agent.py``, which is this side's hands and eyes: it answers one JSON line for each it gets, over one ssh connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
import typing as t

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
HOST_STATE = CHECKOUT / "extensions/molecule/files/host_state.py"

KEEP = bool(os.environ.get("KEEP"))

Json = dict[str, t.Any]


class Failed(AssertionError):
    """What a case promises did not hold."""


def check(holds: t.Any, says: str) -> None:
    """Like assert, but python -O does not turn it off."""
    if not holds:
        raise Failed(says)


class Report:
    """The cases of a run: shown as they end, and written to ``results.json`` and ``results.txt``."""

    def __init__(self, results: pathlib.Path, title: str) -> None:
        self.results = results
        self.title = title
        self.started = time.monotonic()
        self.cases: list[Json] = []
        self.facts: Json = {}
        results.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def case(self, name: str) -> t.Iterator[Json]:
        """One case. Its body puts what it saw into the dictionary it gets; a failure is noted and the run goes on."""
        row: Json = {"case": name, "ok": False}
        start = time.monotonic()
        try:
            yield row
            row["ok"] = True
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            if not isinstance(error, Failed):
                traceback.print_exc()
        row["seconds"] = round(time.monotonic() - start, 1)
        self.cases.append(row)
        verdict = "ok  " if row["ok"] else "FAIL"
        print(f"{verdict} {row['seconds']:6.1f} s  {name}" + (f"\n     {row['error']}" if "error" in row else ""))
        self.write()

    def tries(self, host: LabHost, name: str) -> t.Iterator[t.ContextManager[Json]]:
        """One case; and once more where it failed since the emulator had lost an interrupt (``LabHost.is_stuck``)."""
        yield self.case(name)
        if not self.cases[-1]["ok"] and host.free():
            self.cases.pop()
            self.facts["cases repeated, since the emulator had lost an interrupt"] = host.freed
            yield self.case(name)

    def write(self) -> None:
        seconds = round(time.monotonic() - self.started, 1)
        bad = [row for row in self.cases if not row["ok"]]
        record = {"title": self.title, "ok": not bad and bool(self.cases), "seconds": seconds, "facts": self.facts}
        record["cases"] = self.cases
        (self.results / "results.json").write_text(json.dumps(record, indent=2) + "\n")
        lines = [self.title, f"{len(self.cases) - len(bad)} of {len(self.cases)} cases hold; {seconds:.0f} s", ""]
        lines += [f"{key}: {value}" for key, value in self.facts.items()] + [""]
        for row in self.cases:
            lines.append(f"{'ok  ' if row['ok'] else 'FAIL'} {row['seconds']:6.1f} s  {row['case']}")
            lines += [f"                 {row[key]}" for key in ("error", "message") if row.get(key)]
        (self.results / "results.txt").write_text("\n".join(lines) + "\n")

    def end(self, planned: int = 1) -> int:
        """Exit status; a run that ended before its ``planned`` number of cases has failed."""
        self.write()
        bad = [row for row in self.cases if not row["ok"]]
        seconds = time.monotonic() - self.started
        print(f"{self.title}: {len(self.cases) - len(bad)} of {len(self.cases)} cases hold ({seconds:.0f} s)")
        return 1 if bad or len(self.cases) < planned else 0


class LabHost:
    """One lab host, for the time of a ``with``; with KEEP=1 one that is there is used, and left."""

    def __init__(self, results: pathlib.Path, name: str, devices: t.Sequence[Json], **variables: t.Any) -> None:
        self.directory = results.resolve() / "lab"
        self.name = name
        self.inventory = results.resolve() / f"{name}.json"
        host = {"lab_devices": list(devices), **variables}
        inventory = {"lab": {"hosts": {name: host}, "vars": {"lab_dir": str(self.directory)}}}
        self.inventory.parent.mkdir(parents=True, exist_ok=True)
        self.inventory.write_text(json.dumps(inventory, indent=2) + "\n")
        self._agent: subprocess.Popen[str] | None = None
        self._owed = 0  # answers that the agent owes
        self._read = 0  # how much of the console has been looked at
        self._complaints: list[str] = []
        self.freed = 0  # how often the emulator had lost an interrupt

    def __enter__(self) -> LabHost:
        # So that a run that is ended from outside destroys its host as well.
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
        if not KEEP:
            self.lab("absent")
        try:
            self.lab("started")
        except BaseException:
            self.lab("absent")
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._hang_up()
        with contextlib.suppress(OSError):
            console = (self.directory / self.name / "serial.log").read_bytes()
            (self.inventory.parent / f"{self.name}-console.log").write_bytes(console)
        if not KEEP:
            self.lab("absent")

    # -- power -----------------------------------------------------------------------------------------------------

    def lab(self, state: str) -> None:
        """Bring the host to a state with the collection's own playbook."""
        command = ["ansible-playbook", "-i", str(self.inventory), "iommufd.host.lab", "-e", f"lab_state={state}"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1500, check=False
        )
        if done.returncode:
            raise RuntimeError(f"lab_state={state} failed:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")

    def boot_id(self) -> str:
        return self.sh("cat /proc/sys/kernel/random/boot_id").strip()

    def reset(self, before: str) -> None:
        """Press the reset button, also in the midst of a call: what the host has not yet given to its disks is lost.

        To end the emulator would be no power failure: its disks pass over the flushes that such a one spares.

        Args:
            before: the boot id, for the host to be back with another one.
        """
        self._press_reset()
        self._hang_up()
        self.await_boot(before)

    def _press_reset(self) -> None:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(60)
            channel.connect(os.path.relpath(self.directory / self.name / "qmp.sock"))
            lines = channel.makefile("rw", encoding="utf-8")
            for word in ("qmp_capabilities", "system_reset"):
                lines.write(json.dumps({"execute": word}) + "\n")
                lines.flush()
                while "return" not in json.loads(lines.readline()):
                    pass  # the greeting, or an event

    def _console(self) -> str:
        """What the console has told since it was last looked at."""
        return (self.directory / self.name / "serial.log").read_bytes()[self._read :].decode(errors="replace")

    def is_stuck(self) -> bool:
        """Whether the emulator has lost an interrupt, so that a processor of the host sleeps for ever.

        QEMU 10.0's TCG with several threads does so once in a while, the more the busier the machine is: the timer's
        vector stays "in service" in the local APIC (``info lapic``: ISR 236) of a processor that is halted, and
        everything below it waits. Linux tells that as a stall of RCU whose timer did not wake it up. What runs on the
        host is not the cause.
        """
        return "kthread timer wakeup didn't happen" in self._console()

    def last_panic(self) -> str:
        """The last panic of its kernel, in whichever boot."""
        found = re.findall(r"Kernel panic - not syncing: (.*)", self._console())
        return found[-1].strip() if found else ""

    def free(self) -> bool:
        """Reset a host that is stuck; whether it was."""
        if not self.is_stuck():
            return False
        self._set_aside()
        self._press_reset()
        self._hang_up()
        self.await_boot("")
        return True

    def _set_aside(self) -> None:
        """Keep what the kernel complained of until it got stuck; the rest is no complaint."""
        told = self._console()
        self._complaints += _complaints(told.partition("detected stalls on CPUs")[0])
        self._read += len(told.encode(errors="replace"))
        self.freed += 1
        print(f"     the emulator has lost an interrupt; {self.name} is reset", flush=True)

    def _is_on(self) -> bool:
        try:
            os.kill(int((self.directory / self.name / "qemu.pid").read_text()), 0)
        except (OSError, ValueError):
            return False
        return True

    def _last_words(self) -> str:
        lines = (self.directory / self.name / "qemu.stderr").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def reboot(self) -> None:
        """Shut down and boot in an orderly way, from within."""
        before = self.boot_id()
        self._hang_up()
        subprocess.run(
            self._ssh("systemctl reboot"), stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
        self.await_boot(before)

    def await_boot(self, before: str, timeout: float = 600) -> None:
        """Wait until ssh answers in another boot than the one whose boot id is given.

        QEMU 10.0 sometimes ends by itself while the firmware or the kernel lays out the PCI devices after a reset
        (iotlb_to_section: Assertion `section_index < d->map.sections_nb' failed). That is a power cut more, and the
        host is turned on again.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self._is_on():
                print(f"     the emulator has ended: {self._last_words()}; {self.name} is turned on again", flush=True)
                self.lab("started")
                deadline = time.monotonic() + timeout
            if self.freed < 20 and self.is_stuck():
                self._set_aside()
                self._press_reset()
                deadline = time.monotonic() + timeout
            with contextlib.suppress(subprocess.TimeoutExpired):
                command = self._ssh("cat /proc/sys/kernel/random/boot_id")
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
                )
                if done.returncode == 0 and done.stdout.strip() != before:
                    return
            time.sleep(1)
        raise RuntimeError(f"{self.name} did not come back within {timeout:.0f} s")

    # -- going in --------------------------------------------------------------------------------------------------

    def _ssh(self, command: str) -> list[str]:
        return [str(self.directory / self.name / "ssh"), command]

    def ansible(
        self,
        module: str,
        options: Json,
        check_mode: bool = False,
        variables: t.Mapping[str, str] | None = None,
    ) -> Json:
        """Run a module as a user does, by the ``ansible`` command; returns the module's result.

        Raises:
            subprocess.TimeoutExpired: it took longer than a quarter of an hour, or the host got stuck meanwhile.
        """
        command = ["ansible", "-i", str(self.directory / "inventory.yml"), self.name, "-m", module, "-a"]
        command += [json.dumps(options), *(["--check", "--diff"] if check_mode else [])]
        command += [word for item in (variables or {}).items() for word in ("-e", "=".join(item))]
        environment = dict(os.environ, ANSIBLE_NOCOLOR="1", ANSIBLE_CALLBACK_RESULT_FORMAT="json")
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            deadline = time.monotonic() + 900
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=20)
                    break
                except subprocess.TimeoutExpired:
                    if self.is_stuck() or time.monotonic() > deadline:
                        process.kill()
                        raise
        match = re.search(r"^\S+ \| (\w+)!? => (\{.*\})\s*$", stdout, re.MULTILINE | re.DOTALL)
        if match is None:
            raise RuntimeError(f"{shlex.join(command)} answered:\n{stdout[-2000:]}{stderr[-2000:]}")
        result: Json = json.loads(match[2])
        result["failed"] = match[1] != "SUCCESS" and match[1] != "CHANGED"
        return result

    def aside(self, script: str, timeout: float = 300) -> str:
        """Run a shell script over a connection of its own, while the agent is busy."""
        done = subprocess.run(
            self._ssh(script), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
        check(done.returncode == 0, f"`{script}` ended with status {done.returncode}: {done.stderr}")
        return done.stdout

    def record(self) -> None:
        """Record the whole host, durably: /etc, /boot, /usr, packages, drivers, services."""
        self.sh("python3 /var/tmp/proof/host_state.py record /var/tmp/proof/before.json; sync", timeout=900)

    def unequal(self) -> list[str]:
        """What is not as it was recorded. Which kernel modules are loaded says only which programs have run."""
        script = "python3 /var/tmp/proof/host_state.py compare /var/tmp/proof/before.json"
        lines = self.sh(script, timeout=900, ok=(0, 1)).splitlines()
        return [line for line in lines if line.strip() and not line.startswith("kernel module ")]

    def complaints(self) -> list[str]:
        """What the kernel complained of on its console, in all boots of this host."""
        return self._complaints + _complaints(self._console())

    def install_agent(self, module: str = "iommufd.host.vfio_bind") -> None:
        """Put the agent on the host, and beside it the module with its whole payload as Ansible packs and ships it.

        Ansible's own way to debug a module: keep what was sent, and let it unpack itself. So the module can be called,
        and killed, without a controller's round trip for each call.
        """
        environment = dict(os.environ, ANSIBLE_KEEP_REMOTE_FILES="1")
        command = ["ansible", "-i", str(self.directory / "inventory.yml"), self.name, "-m", module, "--check", "-a"]
        options = json.dumps({"devices": ["0000:00:03.0"]})  # refused, which does not matter here
        subprocess.run(
            [*command, options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
            env=environment,
            check=False,
        )
        for source in (HERE / "_agent.py", HOST_STATE):
            self.put(source.read_bytes(), f"/var/tmp/proof/{source.name}")
        script = (
            "set -e; cd /root/.ansible/tmp/ansible-tmp-*; python3 AnsiballZ_vfio_bind.py explode >/dev/null; "
            "rm -rf /var/tmp/proof/payload; mv debug_dir /var/tmp/proof/payload; cd /; rm -rf /root/.ansible; sync"
        )
        done = subprocess.run(
            self._ssh(script), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
        )
        check(done.returncode == 0, f"the module could not be unpacked: {done.stderr}")

    def put(self, content: bytes, path: str) -> None:
        script = f"mkdir -p {shlex.quote(os.path.dirname(path))} && cat >{shlex.quote(path)}"
        subprocess.run(self._ssh(script), input=content, check=True, timeout=300)

    # -- the agent -------------------------------------------------------------------------------------------------

    def _hang_up(self) -> None:
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()
            self._agent = None
        self._owed = 0

    def tell(self, do: str, **arguments: t.Any) -> None:
        """Give the agent an order without waiting for its answer."""
        if self._agent is None:
            self._agent = subprocess.Popen(
                self._ssh("exec python3 -u /var/tmp/proof/_agent.py"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        stdin = t.cast(t.IO[str], self._agent.stdin)
        stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        stdin.flush()
        self._owed += 1

    def answer(self, timeout: float = 600) -> t.Any:
        agent = t.cast("subprocess.Popen[str]", self._agent)
        stdout = t.cast(t.IO[str], agent.stdout)
        deadline = time.monotonic() + timeout
        ready: list[t.Any] = []
        while not ready and time.monotonic() < deadline and not self.is_stuck():
            # One line for each order, so that the buffer holds nothing of the answer yet.
            ready = select.select([stdout], [], [], 20)[0]
        line = stdout.readline() if ready else ""
        if not line:
            self._hang_up()
            raise RuntimeError("the agent does not answer")
        self._owed -= 1
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"on {self.name}: {answer['error']}")
        return answer["value"]

    def ask(self, do: str, **arguments: t.Any) -> t.Any:
        # A case that failed may not have fetched its answer; it is not the answer to this order.
        while self._owed:
            with contextlib.suppress(RuntimeError):
                self.answer()
        self.tell(do, **arguments)
        return self.answer(arguments.get("timeout", 540) + 60)

    def sh(self, script: str, timeout: float = 300, ok: t.Sequence[int] = (0,)) -> str:
        """Run a shell script on the host; returns what it wrote to standard output and error."""
        done = self.ask("sh", script=script, timeout=timeout)
        check(done["rc"] in ok, f"`{script}` ended with status {done['rc']}: {done['out'][-1500:]}")
        return str(done["out"])

    def call(self, **options: t.Any) -> Json:
        """Call vfio_bind on the host. Options with a leading underscore are the agent's (_kill, _check)."""
        return t.cast(Json, self.ask("call", **_split(options)))

    def functions(self, only: t.Sequence[str] = ()) -> Json:
        """Driver and override of every PCI function, or of some, by address."""
        return t.cast(Json, self.ask("functions", only=list(only)))


def _complaints(console: str) -> list[str]:
    return [line for line in console.splitlines() if re.search(r"WARNING:|BUG:|Call Trace|Oops|hung_task", line)]


def _split(options: Json) -> Json:
    orders = {key[1:]: value for key, value in options.items() if key.startswith("_")}
    return {"options": {key: value for key, value in options.items() if not key.startswith("_")}, **orders}


def start_call(host: LabHost, **options: t.Any) -> None:
    """Let the agent start a call whose answer is fetched later with ``host.answer()``."""
    host.tell("call", **_split(options))


def results_directory() -> pathlib.Path:
    """The run's first argument: where it puts what it saw."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} RESULT_DIRECTORY")
    return pathlib.Path(sys.argv[1])
