// Copyright (c) 2026, the iommufd.host authors
// GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later

// The matrix is there already, as HTML. This filters and sorts it, and draws a host's section when its address
// (#host/NAME, or #host/NAME/CHECK) is opened. What hosts supplied only ever becomes text nodes and attribute values.
"use strict";
(async () => {
  /** The embedded data: JSON, one value a line, compressed. A line is parsed when it is needed. */
  async function unpack(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return (await new Response(plain).text()).split("\n");
  }

  const [head, ...hosts] = await unpack(document.getElementById("data").textContent);
  const shared = JSON.parse(head);
  const text = (place) => (place < 0 ? null : shared.strings[place]);
  const FIELD = Object.fromEntries(shared.function.map((name, index) => [name, index]));
  const field = (row, name) => text(row[FIELD[name]]);

  const fleet = document.getElementById("fleet");
  const view = document.getElementById("host");
  const matrix = document.getElementById("matrix");
  const body = matrix.tBodies[0];
  const filter = document.getElementById("filter");
  const shown = document.getElementById("shown");
  const rows = [...body.rows].map((row) => ({
    row,
    index: Number(row.dataset.index),
    status: row.dataset.status,
    name: row.querySelector(".name a").textContent,
    hash: row.querySelector(".name a").getAttribute("href"),
    text: null,
  }));
  const checks = [...matrix.tHead.querySelectorAll("[data-check]")].map((cell) => cell.dataset.check);
  const FIRST_CHECK = 3; // cells before the checks: host, verdict, functions

  /** An element: make("p", {class: "lead"}, "text", child, null …). */
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

  // -- filter -----------------------------------------------------------------------------------------------------------

  /** All that a host can be found by, in lower case; made when it is first looked for. */
  function haystack(entry) {
    if (entry.text === null) {
      const words = [entry.name, `status:${entry.status}`, entry.row.querySelector(".verdict").textContent];
      for (const small of entry.row.querySelectorAll("small, .reason")) words.push(small.textContent);
      const data = JSON.parse(hosts[entry.index]);
      for (const check of data.checks) {
        const status = text(check[1]);
        words.push(`${status}:${text(check[0])}`);
        if (status === "fail" || status === "warn") words.push(text(check[2]));
      }
      for (const row of data.functions) {
        for (const name of ["address", "identity", "vendor", "class", "driver", "cdev"]) words.push(field(row, name));
        for (const use of row[FIELD.uses]) words.push(text(use));
      }
      entry.text = [...new Set(words)].join("\n").toLowerCase();
    }
    return entry.text;
  }

  function apply() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const pressed = fleet.querySelector('.tile[aria-pressed="true"]').dataset.status;
    let count = 0;
    for (const entry of rows) {
      const fits = (!pressed || entry.status === pressed) && words.every((word) => haystack(entry).includes(word));
      entry.row.hidden = !fits;
      count += fits;
    }
    shown.textContent = count === rows.length ? plural(count, "host") : `${count} of ${plural(rows.length, "host")}`;
  }

  let waiting = 0;
  filter.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, rows.length > 100 ? 120 : 0);
  });
  fleet.querySelector(".filter").addEventListener("submit", (event) => {
    event.preventDefault();
    apply();
  });
  fleet.querySelector(".tiles").addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    for (const one of fleet.querySelectorAll(".tile")) one.setAttribute("aria-pressed", String(one === tile));
    apply();
  });
  for (const button of fleet.querySelectorAll("[data-filter]")) {
    button.addEventListener("click", () => {
      filter.value = filter.value === button.dataset.filter ? "" : button.dataset.filter;
      apply();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.target instanceof HTMLInputElement) return;
    if (event.key === "/" && !fleet.hidden) {
      event.preventDefault();
      filter.focus();
    } else if (event.key === "Escape" && fleet.hidden) {
      location.hash = "";
    }
  });

  // -- sort -------------------------------------------------------------------------------------------------------------

  const VERDICTS = ["unreachable", "failed", "not_ready", "ready"];
  const MARKS = ["fail", "warn", "ok", "skip"];

  function rank(entry, column) {
    if (column === 1) return VERDICTS.indexOf(entry.status);
    const mark = column < entry.row.cells.length && entry.row.cells[column].querySelector(".mark");
    return mark ? MARKS.indexOf(mark.classList[1]) : MARKS.length;
  }

  const sortable = [...matrix.tHead.querySelectorAll("th button")].map((button) => {
    const head = button.closest("th");
    const check = head.dataset.check;
    return { head, button, column: check ? FIRST_CHECK + checks.indexOf(check) : head.cellIndex };
  });
  for (const { head, button, column } of sortable) {
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of sortable) other.head.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const order = new Intl.Collator(undefined, { numeric: true });
      const keyed = rows.map((entry) => [column === 0 ? 0 : rank(entry, column), entry]);
      keyed.sort((a, b) => a[0] - b[0] || order.compare(a[1].name, b[1].name));
      if (descending) keyed.reverse();
      body.append(...keyed.map(([, entry]) => entry.row));
    });
  }

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row || event.target.closest("a") || String(getSelection())) return;
    const hash = row.querySelector(".name a").getAttribute("href");
    const cell = event.target.closest("td");
    const check = cell && row.cells.length > FIRST_CHECK ? checks[cell.cellIndex - FIRST_CHECK] : undefined;
    location.hash = check === undefined ? hash : `${hash}/${encodeURIComponent(check)}`;
  });

  // What a check found, as a tooltip; made when somebody points at it, for most are never looked at.
  body.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("td");
    const check = cell && cell.querySelector(".mark") && checks[cell.cellIndex - FIRST_CHECK];
    if (!check || cell.title) return;
    const found = JSON.parse(hosts[cell.parentNode.dataset.index]).checks.find((one) => text(one[0]) === check);
    if (found) cell.title = `${check}: ${text(found[2]) || ""}`;
  });

  // -- one host ---------------------------------------------------------------------------------------------------------

  const STATES = { vfio: "on vfio", free: "free", used: "in use", bridge: "bridge", unknown: "use not known" };
  const TITLES = {
    distribution: "Distribution", kernel: "Kernel", iommu: "IOMMU", nodes: "Device nodes", guests: "Running guests",
    qemu: "QEMU", libvirt: "libvirt", security: "Security", memlock: "Limits on locked memory",
  };

  /** Words in which `this` is code. */
  const withCode = (words) => words.split("`").map((part, index) => (index % 2 ? make("code", {}, part) : part));

  function checkList(list, chosen) {
    return make("ul", { class: "checks" }, list.map(([id, status, detail, remedy]) => {
      const name = text(id) || "?";
      const state = text(status) || "?";
      const kind = shared.marks.includes(state) ? state : "other";
      return make("li", { class: name === chosen ? `${kind} target` : kind },
        make("span", { class: `mark ${kind}` }, state),
        make("code", {}, name),
        make("div", {},
          make("p", {}, ...withCode(text(detail) || "")),
          remedy < 0 ? null : make("p", { class: "remedy" }, ...withCode(text(remedy)))));
    }));
  }

  function functionBox(row) {
    const get = (name) => field(row, name);
    const state = get("state");
    const uses = row[FIELD.uses].map(text);
    const driver = get("driver");
    const more = [
      driver ? `driver ${driver}` : "no driver",
      get("vfs") ? `PF, ${get("vfs")} VFs` : null,
      get("physfn") ? `VF of ${get("physfn")}` : null,
      get("cdev"),
      row[FIELD.platform] || !get("resets") ? null : `reset ${get("resets")}`,
    ];
    const label = STATES[state];
    return make("div", { class: `function is-${state}`, title: [label, ...uses].join("\n") },
      make("div", { class: "line" },
        make("span", { class: "address" }, get("address") || "?"), make("span", { class: "state" }, label)),
      make("div", { class: "what" },
        [get("class"), get("vendor")].filter(Boolean).join(" · ") || "Unknown function", " ",
        make("code", {}, get("identity") || "")),
      make("div", { class: "more" }, more.filter(Boolean).join(" · ")),
      uses.length ? make("ul", { class: "uses", "aria-label": "Used for" }, uses.map((use) => make("li", {}, use))) : null);
  }

  /** The groups as {number, type, bad, others, members, node, platform}; what is in no group comes last. */
  function gather(functions, groups) {
    const found = new Map();
    const at = (key, number) => {
      if (!found.has(key)) found.set(key, { number, type: null, bad: false, others: [], members: [] });
      return found.get(key);
    };
    for (const [place, type, bad, others] of groups) {
      Object.assign(at(text(place), text(place)), { type: text(type), bad: Boolean(bad), others: others.map(text) });
    }
    for (const row of functions) {
      const number = field(row, "group");
      at(number === null ? Boolean(row[FIELD.platform]) : number, number).members.push(row);
    }
    for (const group of found.values()) {
      const nodes = group.members.map((row) => field(row, "node")).filter((node) => node !== null && node !== "-1");
      group.node = nodes.length ? nodes[0] : null;
      group.platform = !group.bad && group.members.every((row) => row[FIELD.platform]);
    }
    const key = (group) => (group.number === null ? Infinity : Number(group.number));
    return [...found.values()].filter((group) => group.members.length || group.others.length).sort((a, b) => key(a) - key(b));
  }

  function groupWord(group) {
    if (group.number === null) return "the IOMMU is off, or does not reach them";
    if (group.bad) return "✕ not viable";
    const states = new Set(group.members.map((row) => field(row, "state")).filter((state) => state !== "bridge"));
    const goesWhole = group.members.length > 1 ? `${group.members.length} functions, as a whole` : null;
    if (states.has("used")) return [goesWhole, "held by the host"].filter(Boolean).join(" · ");
    return [goesWhole, group.type].filter(Boolean).join(" · ");
  }

  function groupBox(group) {
    const name = group.number === null ? "No IOMMU group" : `Group ${group.number}`;
    const kind = group.bad ? "group bad" : group.number === null ? "group loose" : "group";
    return make("article", { class: kind, "aria-label": name },
      make("h4", {}, make("span", {}, name), make("span", {}, groupWord(group))),
      make("div", { class: "members" }, group.members.map(functionBox)),
      group.others.map((other) => make("div", { class: "function is-unknown" }, other)));
  }

  function groupMap(functions, groups) {
    const byNode = new Map();
    for (const group of gather(functions, groups)) {
      if (!byNode.has(group.node)) byNode.set(group.node, []);
      byNode.get(group.node).push(group);
    }
    const order = [...byNode.keys()].sort((a, b) => (a === null) - (b === null) || Number(a) - Number(b));
    return [
      make("div", { class: "key", "aria-hidden": "true" }, Object.entries(STATES).map(([state, words]) =>
        make("span", { class: `is-${state}` }, make("i"), words))),
      ...order.map((node) => {
        const all = byNode.get(node);
        const main = all.filter((group) => !group.platform);
        const platform = all.filter((group) => group.platform);
        const count = all.reduce((sum, group) => sum + group.members.length, 0);
        const label = node === null ? "NUMA node not known" : `NUMA node ${node}`;
        const real = all.filter((group) => group.number !== null).length;
        return make("div", { class: "node" },
          make("h3", {}, `${label} · ${real ? `${plural(real, "group")}, ` : ""}${plural(count, "function")}`),
          main.length ? make("div", { class: "groups" }, main.map(groupBox)) : null,
          platform.length
            ? make("details", { class: "fold", open: !main.length },
                make("summary", {}, `${plural(platform.reduce((sum, group) => sum + group.members.length, 0), "function")} of the platform itself (bridges, memory controllers, performance counters)`),
                make("div", { class: "groups" }, platform.map(groupBox)))
            : null);
      }),
    ];
  }

  // -- facts: whatever the survey has, also what this script has never heard of --------------------------------------

  const isPlain = (value) => value === null || typeof value !== "object";
  const isShort = (value) => isPlain(value) || (Array.isArray(value) && value.every(isPlain));
  const nice = (key) => key.replaceAll("_", " ");

  function plain(value) {
    if (value === null || value === "") return make("span", { class: "none" }, value === null ? "not known" : "none");
    if (typeof value === "boolean") return value ? "yes" : "no";
    return String(value);
  }

  function facts(value, depth) {
    if (isPlain(value)) return plain(value);
    if (Array.isArray(value)) {
      if (!value.length) return make("span", { class: "none" }, "none");
      if (value.every(isPlain)) return make("span", { class: "inline" }, value.map((one) => make("span", {}, plain(one))));
      if (value.every((one) => !isPlain(one) && !Array.isArray(one))) return factTable(value, depth);
      return make("ul", {}, value.map((one) => make("li", {}, facts(one, depth + 1))));
    }
    const entries = Object.entries(value);
    if (!entries.length) return make("span", { class: "none" }, "none");
    if (depth > 0 && entries.every(([, one]) => isShort(one))) {
      const known = entries.filter(([, one]) => one !== null && String(one) !== "");
      return make("span", { class: "inline" }, known.map(([key, one]) => make("span", {}, `${key}=${one}`)));
    }
    return make("dl", {}, entries.flatMap(([key, one]) => [make("dt", {}, nice(key)), make("dd", {}, facts(one, depth + 1))]));
  }

  function factTable(list, depth) {
    const keys = [...new Set(list.flatMap((one) => Object.keys(one)))];
    return make("div", { class: "wide" }, make("table", {},
      make("thead", {}, make("tr", {}, keys.map((key) => make("th", { scope: "col" }, nice(key))))),
      make("tbody", {}, list.map((one) => make("tr", {}, keys.map((key) =>
        make("td", {}, key in one ? facts(one[key], depth + 1) : "")))))));
  }

  function factCards(all) {
    return make("div", { class: "facts" }, Object.entries(all).map(([key, value]) =>
      make("section", { class: "card" }, make("h2", {}, TITLES[key] || nice(key)), facts(value, 0))));
  }

  function rawData(data) {
    const named = data.functions.map((row) => Object.fromEntries(shared.function.map((name) =>
      [name, name === "uses" ? row[FIELD.uses].map(text) : name === "platform" ? Boolean(row[FIELD.platform]) : field(row, name)])));
    const pre = make("pre", { tabindex: "0" });
    const fold = make("details", { class: "card" }, make("summary", {}, "Data of this page as JSON"), pre,
      make("p", {}, "The whole survey of the host is in ", make("a", { href: "report.json" }, "report.json"), "."));
    fold.addEventListener("toggle", () => {
      pre.textContent ||= JSON.stringify({ functions: named, ...data.facts }, null, 2);
    });
    return fold;
  }

  function steps(entry) {
    const visible = [...body.rows].filter((row) => !row.hidden).map((row) => row.querySelector(".name a").getAttribute("href"));
    const place = visible.indexOf(entry.hash);
    const step = (label, hash) => (hash ? make("a", { class: "step", href: hash }, label) : null);
    return make("nav", { class: "steps", "aria-label": "Hosts" }, make("a", { class: "step", href: "#" }, "← All hosts"),
      make("span", { class: "gap" }), step("‹ Previous", visible[place - 1]), step("Next ›", place < 0 ? null : visible[place + 1]));
  }

  function draw(entry, chosen) {
    const data = JSON.parse(hosts[entry.index]);
    const functions = data.functions;
    const head = make("div", { class: "head" },
      make("h2", { tabindex: "-1" }, entry.name), entry.row.querySelector(".verdict").cloneNode(true));
    const below = entry.row.querySelector("small");
    const parts = [steps(entry), head, make("p", { class: "lead" }, (below && below.textContent) || "", data.reason < 0 ? null :
      make("span", {}, below ? " — " : "", text(data.reason)))];
    if (!entry.row.querySelector(".reason")) {
      const figure = (count, word, kind) => make("div", { class: kind || "" }, make("b", {}, String(count)), word);
      const inState = (state) => functions.filter((row) => field(row, "state") === state && !row[FIELD.platform]).length;
      parts.push(
        make("div", { class: "figures" },
          figure(data.groups.length, "IOMMU groups"), figure(functions.length, "PCI functions"),
          figure(inState("vfio"), "on vfio", "vfio"), figure(inState("free"), "free", "free"),
          figure(inState("used"), "in use by the host", "used"),
          figure(functions.filter((row) => field(row, "physfn")).length, "SR-IOV VFs")),
        make("section", { class: "card" }, make("h2", {}, "Checks"), checkList(data.checks, chosen)),
        make("section", { class: "card", id: "groups" }, make("h2", {}, "IOMMU groups"),
          functions.length ? groupMap(functions, data.groups) : make("p", { class: "none" }, "No PCI functions are known.")),
        factCards(data.facts), rawData(data));
    }
    view.replaceChildren(...parts);
    const target = view.querySelector("li.target");
    if (target) target.scrollIntoView({ block: "center" });
    else scrollTo(0, 0);
    head.firstChild.focus({ preventScroll: true });
  }

  let left = 0; // how far the fleet was scrolled when it was left
  function route() {
    const hash = location.hash;
    const entry = rows.find((one) => hash === one.hash || hash.startsWith(`${one.hash}/`));
    if (entry && !fleet.hidden) left = scrollY;
    fleet.hidden = Boolean(entry);
    view.hidden = !entry;
    if (!entry) {
      view.replaceChildren();
      scrollTo(0, left);
      return;
    }
    let chosen = null;
    try {
      chosen = decodeURIComponent(hash.slice(entry.hash.length + 1));
    } catch {
      // somebody's own address, no check of ours
    }
    draw(entry, chosen);
  }
  addEventListener("hashchange", route);

  // -- light and dark -----------------------------------------------------------------------------------------------

  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  apply();
  route();
  document.querySelector("main").removeAttribute("aria-busy");
})();
