// The data: rows (one node of either graph or the same of both) and the sections they stand in.
const STATUSES = ["kept", "rewired", "changed", "added", "removed"];
const MARKS = { kept: "", rewired: "\u21b7", changed: "\u2260", added: "+", removed: "\u2212" };
const [MODULE, ALIKE, SAME] = [0, 1, 2];
const WORDS = { kept: "unchanged", rewired: "reads another value than before", changed: "changed",
  added: "added", removed: "removed" };

// One side of a row: code in pieces (a number is the row of a value that is read), and where from.
function unpackSide(packed, strings) {
  if (!packed) return null;
  const [pieces, node, op, target, place, source, shape, kind] = packed;
  const text = (number) => strings[number];
  return { pieces, node, op: text(op), target: text(target), place: text(place),
    source: text(source), shape: text(shape), kind: text(kind),
    reads: pieces.filter((piece) => typeof piece === "number") };
}

function unpackRow(packed, id, strings) {
  const [status, name, scope, before, after] = packed;
  const left = unpackSide(before, strings);
  const right = packed.length > 4 ? unpackSide(after, strings) : left;
  return { id, status: STATUSES[status], name, scope: strings[scope], sides: [left, right],
    parent: null, users: [[], []] };
}

function unpackSection(packed, parent, rows) {
  const [sort, path, kind, size, changed, items] = packed;
  const section = { sort, path, kind, size, changed, parent, open: false };
  section.items = items.map((item) => {
    if (typeof item !== "number") return unpackSection(item, section, rows);
    rows[item].parent = section;
    return rows[item];
  });
  return section;
}

function isSection(item) {
  return item.items !== undefined;
}

// Unchanged modules start folded, and so do all but the first of identical ones.
function openChanged(section) {
  section.open = section.parent === null || (section.changed > 0 && section.sort !== SAME);
  section.items.filter(isSection).forEach((child, number) => {
    openChanged(child);
    if (section.sort === ALIKE && number > 0) child.open = false;
  });
}

function unpack(diff) {
  const rows = diff.rows.map((packed, id) => unpackRow(packed, id, diff.strings));
  for (const row of rows) {
    row.sides.forEach((side, number) => {
      for (const read of new Set(side ? side.reads : [])) rows[read].users[number].push(row.id);
    });
  }
  const tree = unpackSection(diff.tree, null, rows);
  openChanged(tree);
  const changes = rows.filter((row) => row.status !== "kept");
  return { ...diff, rows, tree, changes, texts: null };
}

// What stands on the page from top to bottom: sections, and rows with one or both of their sides.
function flatten(model, unified) {
  const lines = [];
  const visit = (section, depth) => {
    for (const item of section.items) {
      if (isSection(item)) {
        lines.push({ item, depth });
        if (item.open) visit(item, depth + (item.sort === MODULE ? 1 : 0));
      } else if (unified && item.sides[0] && item.sides[1] && item.status !== "kept") {
        lines.push({ item, depth, side: 0 }, { item, depth, side: 1 });
      } else {
        lines.push({ item, depth, side: item.sides[1] ? 1 : 0 });
      }
    }
  };
  visit(model.tree, 0);
  return lines;
}

function shortName(name, scope) {
  const rest = scope && name.startsWith(scope + ".") ? name.slice(scope.length + 1) : name;
  return /^\d/.test(rest) ? name : rest;
}

function codeText(model, row, number) {
  const side = row.sides[number];
  const pieces = side.pieces.map((piece) =>
    typeof piece === "number" ? shortName(model.rows[piece].name, row.scope) : piece);
  const left = side.op === "output" ? "return " : shortName(row.name, row.scope) + " = ";
  return left + pieces.join("");
}

function search(model, query) {
  model.texts ??= model.rows.map((row) => [0, 1].filter((n) => row.sides[n]).map((n) =>
    [row.name, codeText(model, row, n), row.sides[n].node, row.sides[n].target,
      row.sides[n].place, row.sides[n].source, row.sides[n].kind].join("\n")).join("\n").toLowerCase());
  const wanted = query.toLowerCase();
  return model.rows.filter((row) => model.texts[row.id].includes(wanted));
}

// Unfold everything around a row or a section.
function reveal(item) {
  for (let section = item.parent; section; section = section.parent) section.open = true;
}

function lastPart(path) {
  return path.slice(path.lastIndexOf(".") + 1);
}

function sectionTitle(section) {
  const last = section.items.at(-1);
  if (section.sort === ALIKE) return `${section.path} .. ${last.path}`;
  if (section.sort === SAME) return "\u22ef";
  return section.path;
}
