// Drawing lines: only those in view are in the document.
const HEIGHT = 26;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// The pieces of one side as spans; values that are not those of the other side stand out.
function codeSpans(model, row, number) {
  const side = row.sides[number];
  const other = row.sides[1 - number];
  const isOutput = side.op === "output";
  const spans = [element("span", { class: "name" }, isOutput ? "return" : shortName(row.name, row.scope)),
    isOutput ? " " : element("span", { class: "also" }, " = ")];
  const comparable = other && other.pieces.length === side.pieces.length;
  side.pieces.forEach((piece, place) => {
    const text = typeof piece === "number" ? shortName(model.rows[piece].name, row.scope) : piece;
    const differs = other && row.status !== "kept" && (comparable ? other.pieces[place] !== piece
      : typeof piece === "number" && !other.reads.includes(piece));
    spans.push(differs ? element("span", { class: "other" }, text) : text);
  });
  return spans;
}

function cell(model, line, number) {
  const row = line.item;
  const side = row.sides[number];
  if (!side) return element("div", { class: "cell void", role: "gridcell" });
  const both = row.sides[0] && row.sides[1];
  const mark = both && line.split === false && row.status !== "kept"
    ? (number ? MARKS[row.status] : "\u2212") : MARKS[row.status];
  const classes = ["cell", row.status === "kept" ? "quiet" : row.status];
  const code = element("code", {}, ...codeSpans(model, row, number));
  return element("div", { class: classes.join(" "), role: "gridcell", "data-side": number },
    element("span", { class: `mark ${row.status}`, ...(mark ? { role: "img", "aria-label": WORDS[row.status] } : {}) }, mark), code);
}

function rowElement(model, line, unified, found) {
  const row = line.item;
  const numbers = unified ? [line.side] : [0, 1];
  const cells = numbers.map((number) => cell(model, { ...line, split: !unified }, number));
  const classes = `row${unified ? " one" : ""}${found.has(row.id) ? " found" : ""}`;
  return element("div", { class: classes, "data-row": row.id, "data-status": row.status }, ...cells);
}

function sectionElement(section) {
  const nodes = `${section.size} node${section.size === 1 ? "" : "s"}`;
  const parts = [element("i", { "aria-hidden": "true" }, section.open ? "\u25be" : "\u25b8")];
  if (section.sort === SAME) {
    parts.push(element("span", {}, `${nodes} unchanged`));
  } else {
    parts.push(element("b", {}, sectionTitle(section)));
    const alike = section.sort === ALIKE ? `${section.items.length} identical` : section.kind;
    if (alike) parts.push(element("span", {}, alike));
    parts.push(element("span", { class: section.changed ? "counts" : "counts quiet" }, section.changed
      ? `${section.changed} of ${nodes} differ` : nodes));
  }
  const sort = ["module", "alike", "same"][section.sort];
  return element("div", { class: `row section ${sort}`, "aria-expanded": String(section.open) },
    element("p", { role: "gridcell" }, ...parts));
}

// The lines between two places of the page; each is put where it belongs.
function lineElements(view, first, last) {
  const made = [];
  for (let place = first; place < last; place++) {
    const line = view.lines[place];
    const node = isSection(line.item) ? sectionElement(line.item)
      : rowElement(view.model, line, view.unified, view.found);
    node.setAttribute("role", "row");
    node.id = `line-${place}`;
    node.dataset.place = place;
    node.setAttribute("aria-rowindex", place + 1);
    node.setAttribute("aria-level", line.depth + 1);
    node.style.setProperty("--depth", line.depth);
    node.style.top = `${place * HEIGHT}px`;
    made.push(node);
  }
  return made;
}

// Mark the current line, and what the row in question reads and who reads it.
function markElements(view, elements) {
  for (const node of elements) {
    node.classList.toggle("here", view.lines[node.dataset.place].item === view.here);
    for (const side of node.querySelectorAll("[data-side]")) {
      const [id, number] = [Number(node.dataset.row), side.dataset.side];
      side.classList.toggle("input", view.marks.inputs[number].has(id));
      side.classList.toggle("user", view.marks.users[number].has(id));
    }
  }
}

// The modules at the left; folded and unfolded together with the lines.
function treeElements(section, depth, view) {
  const list = element("ul", { role: depth ? "group" : "tree" });
  for (const item of section.items.filter((child) => isSection(child))) {
    if (item.sort === SAME) {
      list.append(...treeElements(item, depth, view).children);
      continue;
    }
    const folds = item.items.some(isSection);
    const title = item.sort === ALIKE ? `${lastPart(item.path)} .. ${lastPart(item.items.at(-1).path)}` : lastPart(item.path);
    const note = item.sort === ALIKE ? `\u00d7 ${item.items.length}` : item.kind;
    const button = element("button", { type: "button", class: `branch${item.changed ? "" : " quiet"}`,
      title: sectionTitle(item), tabindex: "-1", onclick: (event) => view.visit(item, event) },
    element("i", { "aria-hidden": "true" }, folds ? (item.open ? "\u25be" : "\u25b8") : ""),
    element("span", {}, title), element("small", {}, note),
    item.changed ? element("b", { title: `${item.changed} differ` }, String(item.changed)) : null);
    button.style.setProperty("--depth", depth);
    const entry = element("li", { role: "treeitem", "aria-expanded": folds ? String(item.open) : undefined,
      "aria-selected": "false" }, button);
    if (folds && item.open) entry.append(treeElements(item, depth + 1, view));
    list.append(entry);
  }
  return list;
}
