// The page: what is shown, and what keys and clicks do.
const byId = (id) => document.getElementById(id);
const DATA = JSON.parse(byId("data").textContent);
const NARROW = matchMedia("(max-width: 760px)");
const NOTHING = { inputs: [new Set(), new Set()], users: [new Set(), new Set()] };
const models = DATA.diffs.map(() => null);
const view = { step: 0, model: null, lines: [], wanted: false, unified: false, here: null, hover: null, pressed: null,
  marks: NOTHING, found: new Set(), hits: [], hit: -1, printing: false, visit: visitSection };

function show(step) {
  view.step = step;
  view.model = models[step] ??= unpack(DATA.diffs[step]);
  view.here = view.hover = null;
  byId("left").textContent = view.model.before;
  byId("right").textContent = view.model.after;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", String(Number(tab.dataset.step) === step));
  }
  showSummary();
  const chains = view.model.chains;
  byId("wiring").hidden = !chains.length;
  byId("wiring").replaceChildren(wiringElement(chains, !NARROW.matches, (row) => row >= 0 && goTo(view.model.rows[row])));
  arrangeLines();
  find(byId("query").value, false);
  mark(null);
  byId("scroll").scrollTop = 0;
}

function showSummary() {
  const { summary } = view.model;
  const parts = ["added", "removed", "changed"].map((status) => [status, `${summary[status]} ${status}`]);
  parts.push(["kept", `${summary.kept} kept`], ["rewired", `${summary.edges_rewired} inputs rewired`]);
  parts.push(["", `edges ${summary.edges_added} added, ${summary.edges_removed} removed`]);
  byId("summary").replaceChildren(...parts.map(([status, text]) => element("li", {},
    status && MARKS[status] ? element("b", { class: `n-${status}`, "aria-hidden": "true" }, `${MARKS[status]} `) : null, text)));
}

// After folding and the like: which lines there are, and the tree beside them.
function arrangeLines() {
  view.unified = NARROW.matches || view.wanted;
  view.lines = flatten(view.model, view.unified);
  byId("heads").hidden = view.unified;
  byId("rows").style.height = `${view.lines.length * HEIGHT}px`;
  byId("rows").setAttribute("aria-rowcount", view.lines.length);
  byId("tree").replaceChildren(treeElements(view.model.tree, 0, view));
  const first = byId("tree").querySelector(".branch");
  if (first) first.tabIndex = 0;
  drawLines();
}

function drawLines() {
  const [rows, scroll] = [byId("rows"), byId("scroll")];
  const above = scroll.scrollTop - rows.offsetTop + scroll.offsetTop;
  const first = view.printing ? 0 : Math.max(0, Math.floor(above / HEIGHT) - 12);
  const last = view.printing ? view.lines.length
    : Math.min(view.lines.length, Math.ceil((above + scroll.clientHeight) / HEIGHT) + 12);
  rows.replaceChildren(...lineElements(view, first, Math.max(first, last)));
  markLines();
}

function markLines() {
  const rows = byId("rows");
  markElements(view, rows.children);
  const here = rows.querySelector(".here");
  if (here) rows.setAttribute("aria-activedescendant", here.id);
  else rows.removeAttribute("aria-activedescendant");
}

function placeOf(item) {
  return view.lines.findIndex((line) => line.item === item);
}

// Make an item the current one, unfolding what hides it.
function goTo(item, focus = true) {
  reveal(item);
  view.here = item;
  arrangeLines();
  mark(isSection(item) ? null : item); // first, for it may take room from the lines
  scrollTo(placeOf(item));
  if (focus) byId("rows").focus({ preventScroll: true });
}

function scrollTo(place) {
  const [rows, scroll] = [byId("rows"), byId("scroll")];
  const top = rows.offsetTop - scroll.offsetTop + place * HEIGHT;
  const seen = top >= scroll.scrollTop + 60 && top + HEIGHT <= scroll.scrollTop + scroll.clientHeight - 40;
  if (!seen) scroll.scrollTop = Math.max(0, top - scroll.clientHeight / 3);
  drawLines();
}

function visitSection(section, event) {
  const onArrow = event.target.tagName === "I";
  if (onArrow || section === view.here) toggle(section);
  else section.open = true;
  if (!onArrow) goTo(section, false);
  if (!onArrow) closeTree();
}

function toggle(section) {
  section.open = !section.open;
  arrangeLines();
}

function closeTree() {
  byId("tree").classList.remove("shown");
  byId("modules").setAttribute("aria-expanded", "false");
}

// Mark what a row reads and who reads it, and say where it comes from.
function mark(row) {
  view.marks = !row ? NOTHING : {
    inputs: row.sides.map((side) => new Set(side ? side.reads : [])),
    users: row.users.map((users) => new Set(users)),
  };
  showDetail(row);
  markLines();
}

function links(label, ids) {
  if (!ids.length) return null;
  const shown = ids.slice(0, 24).map((id) => element("button", { type: "button", onclick: () => goTo(view.model.rows[id]) },
    view.model.rows[id].name));
  const more = ids.length > 24 ? `and ${ids.length - 24} more` : null;
  return element("div", { class: "links" }, element("span", { class: "label" }, label), ...shown, more);
}

function showDetail(row) {
  if (!row) {
    byId("detail").replaceChildren(element("p", { class: "idle" },
      view.model.changes.length ? "Point at a node to see its source, its inputs and its users. " : "The graphs are the same. ",
      element("kbd", {}, "?"), " for keys."));
    return;
  }
  const side = row.sides[1] || row.sides[0];
  const target = side.kind || (side.target === row.name ? "" : side.target);
  const codes = (row.status === "kept" ? [1] : [0, 1]).filter((number) => row.sides[number]).map((number) =>
    element("div", { class: "code" }, element("span", { class: `mark ${number ? "added" : "removed"}` },
      row.status === "kept" ? "" : number ? "+ " : "\u2212 "), ...codeSpans(view.model, row, number)));
  const [was, now] = row.sides.map((one) => [...new Set(one ? one.reads : [])]);
  const union = (left, right) => [...new Set([...right, ...left])];
  byId("detail").replaceChildren(...[
    element("div", { class: "top" }, element("h2", {}, row.name),
      element("b", { class: `n-${row.status}` }, `${MARKS[row.status]} ${WORDS[row.status]}`),
      element("span", {}, [side.op, target].filter(Boolean).join(" ")), side.shape ? element("span", {}, side.shape) : null),
    side.place ? element("pre", { class: "source", title: side.place }, `${side.place.split("/").slice(-3).join("/")}  `,
      element("b", {}, side.source)) : null,
    ...codes, links("inputs", union(was, now)), links("users", union(...row.users)),
  ].filter(Boolean));
}

function find(query, move = true) {
  view.hits = query ? search(view.model, query) : [];
  view.found = new Set(view.hits.map((row) => row.id));
  view.hit = -1;
  if (move && view.hits.length) stepHit(1, false);
  else drawLines();
  showCount();
}

function showCount() {
  const { hits, hit } = view;
  byId("count").textContent = !byId("query").value ? "" : hits.length ? `${hit + 1} of ${hits.length}` : "none";
}

function stepHit(by, focus = true) {
  if (!view.hits.length) return;
  view.hit = (view.hit + by + view.hits.length) % view.hits.length;
  goTo(view.hits[view.hit], focus);
  showCount();
}

function stepChange(by) {
  const changes = view.model.changes;
  if (!changes.length) return;
  const from = view.here && !isSection(view.here) ? view.here.id : by > 0 ? -1 : Infinity;
  const next = by > 0 ? changes.find((row) => row.id > from) : changes.findLast((row) => row.id < from);
  goTo(next ?? (by > 0 ? changes[0] : changes.at(-1)));
}

function stepLine(by) {
  const place = view.here ? placeOf(view.here) : -1;
  let next = place + by;
  while (view.lines[next] && view.lines[next].item === view.here) next += by;
  if (view.lines[next]) goTo(view.lines[next].item);
}

// Fold the current section, or the one the current row stands in.
function fold(open) {
  let section = view.here && isSection(view.here) ? view.here : view.here && view.here.parent;
  if (section && open === false && !section.open) section = section.parent;
  if (!section || section.parent === null || section.open === open) return;
  view.here = section;
  toggle(section);
  mark(null);
  scrollTo(placeOf(section));
}

function toggleView() {
  view.wanted = !view.wanted;
  byId("view").setAttribute("aria-pressed", String(view.wanted));
  arrangeLines();
  if (view.here) scrollTo(placeOf(view.here));
}

function nextTheme() {
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];
  const theme = themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % 3];
  root.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
}

// First leave the search with its hits, to step through them with n and N; then clear everything.
function escape() {
  closeTree();
  if (document.activeElement === byId("query") && view.hits.length) {
    byId("rows").focus({ preventScroll: true });
    return;
  }
  byId("query").value = "";
  find("");
  view.here = null;
  mark(null);
  byId("rows").focus({ preventScroll: true });
}

const KEYS = {
  "/": () => byId("query").select(), n: () => stepHit(1), N: () => stepHit(-1),
  j: () => stepChange(1), k: () => stepChange(-1), f: () => fold(), u: toggleView, t: nextTheme,
  "?": () => byId("help").showModal(), Escape: escape,
};
const ROW_KEYS = {
  ArrowDown: () => stepLine(1), ArrowUp: () => stepLine(-1), ArrowLeft: () => fold(false),
  ArrowRight: () => fold(true), Enter: () => fold(), " ": () => fold(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const typing = event.target === byId("query");
  if (typing && event.key !== "Escape") return;
  const inTree = byId("tree").contains(event.target);
  const action = KEYS[event.key] ?? (event.target === byId("rows") ? ROW_KEYS[event.key] : inTree ? treeKey(event) : null);
  if (action) {
    event.preventDefault();
    action();
  }
});

function treeKey(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by) return null;
  const buttons = [...byId("tree").querySelectorAll(".branch")];
  return () => buttons[buttons.indexOf(event.target) + by]?.focus();
}

// By place, for the element that was pressed may have been drawn anew since.
function itemAt(event) {
  const place = Math.floor((event.clientY - byId("rows").getBoundingClientRect().top) / HEIGHT);
  return view.lines[place]?.item ?? null;
}

// Where lines are drawn anew between press and release, the click is the list's, and no line's.
byId("rows").addEventListener("mousedown", (event) => { view.pressed = itemAt(event); });
byId("rows").addEventListener("click", (event) => {
  const item = itemAt(event) ?? view.pressed;
  if (!item) return;
  view.here = item;
  if (isSection(item)) toggle(item);
  mark(isSection(item) ? null : item);
});
byId("rows").addEventListener("mousemove", (event) => {
  const item = itemAt(event);
  if (!item || item === view.hover) return;
  view.hover = item;
  if (!isSection(item)) mark(item);
});
// What was pointed at last stays, so that its links can be reached, unless a row was chosen.
byId("rows").addEventListener("mouseleave", () => {
  view.hover = null;
  if (view.here && !isSection(view.here)) mark(view.here);
});
byId("rows").addEventListener("focus", () => {
  view.here ??= view.lines[0]?.item ?? null;
  markLines();
});
byId("scroll").addEventListener("scroll", () => requestAnimationFrame(drawLines), { passive: true });
byId("search").addEventListener("submit", (event) => { event.preventDefault(); stepHit(1, false); });
byId("query").addEventListener("input", (event) => find(event.target.value));
byId("steps").addEventListener("click", (event) => event.target.dataset.step && show(Number(event.target.dataset.step)));
byId("modules").addEventListener("click", () => {
  const shown = byId("tree").classList.toggle("shown");
  byId("modules").setAttribute("aria-expanded", String(shown));
});
byId("next").addEventListener("click", () => stepChange(1));
byId("previous").addEventListener("click", () => stepChange(-1));
byId("view").addEventListener("click", toggleView);
byId("theme").addEventListener("click", nextTheme);
byId("ask").addEventListener("click", () => byId("help").showModal());
NARROW.addEventListener("change", arrangeLines);
addEventListener("resize", drawLines);
addEventListener("beforeprint", () => {
  for (const chain of document.querySelectorAll("details")) {
    chain.open = true;
    chain.dispatchEvent(new Event("toggle"));
  }
  view.printing = true;
  drawLines();
});
addEventListener("afterprint", () => { view.printing = false; drawLines(); });
show(0);
document.documentElement.dataset.ready = String(Math.round(performance.now()));
