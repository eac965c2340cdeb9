// A reversible chain: two rails, and branches that read one and are added to the other in turn.
const [TOP, MIDDLE, BOTTOM, STEP, GAP] = [44, 100, 156, 104, 46];
const [FROM_START, FROM_END, MOST] = [3, 2, 8];
const SUBSCRIPTS = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089";

function sub(number) {
  return String(number).replace(/\d/g, (digit) => SUBSCRIPTS[digit]);
}

function shape(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

function railOf(state) {
  return state % 2 ? BOTTOM : TOP;
}

function pressable(group, label, action) {
  group.setAttribute("role", "button");
  group.setAttribute("tabindex", "0");
  group.setAttribute("aria-label", label);
  group.addEventListener("click", action);
  group.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.stopPropagation();
      action();
    }
  });
  return group;
}

function clipped(text, most) {
  return text.length > most ? "\u2026" + text.slice(1 - most) : text;
}

// Block i reads the state p_i on its rail and makes p_(i+1) of p_(i-1), which is on the other.
function drawBlock(svg, step, number, x, visit) {
  const [from, to] = [railOf(number), railOf(number + 1)];
  const down = to > from ? 1 : -1;
  const [a, b] = step.coupling;
  svg.append(shape("path", { class: "jump", "marker-end": `url(#${svg.dataset.arrow})`,
    d: `M${x} ${from}V${MIDDLE - down * 17}M${x} ${MIDDLE + down * 17}V${to - down * 12}` }));
  if (a) {
    svg.append(shape("path", { class: "jump direct",
      d: `M${x} ${from}C${x + 52} ${from + down * 20} ${x + 52} ${to - down * 20} ${x + 8} ${to - down * 7}` }));
  }
  const group = shape("g");
  group.append(shape("title", {}, `${step.module}  ${step.source}\n${step.code}`),
    shape("rect", { class: "box", x: x - 25, y: MIDDLE - 17, width: 50, height: 34, rx: 7 }),
    shape("text", { x, y: MIDDLE + 5 }, `F${sub(number)}`));
  svg.append(pressable(group, `Branch ${number}, ${step.module} ${step.source}`, () => visit(step.row)),
    shape("circle", { class: "dot", cx: x, cy: from, r: 3.5 }),
    shape("circle", { class: "plus", cx: x, cy: to, r: 9 }),
    shape("path", { class: "jump", d: `M${x - 5} ${to}h10M${x} ${to - 5}v10` }),
    shape("text", { class: "state", x: x + 22, y: to + (to === TOP ? -9 : 18) }, `p${sub(number + 1)}`),
    shape("text", { class: "tiny", x, y: BOTTOM + 38 }, clipped(step.module, 16)),
    shape("text", { class: "tiny", x, y: BOTTOM + 52 }, clipped(step.source.split(":").at(-1), 16)));
  if (b !== 1) svg.append(shape("text", { class: "tiny", x: x - 24, y: to + (to === TOP ? -9 : 18) }, `\u00d7${b}`));
}

function drawLink(svg, step, x, visit) {
  const group = shape("g");
  group.append(shape("title", {}, "Shape-only operations on both streams"));
  for (const y of [TOP, BOTTOM]) {
    group.append(shape("rect", { class: "box", x: x - 12, y: y - 12, width: 24, height: 24, rx: 5 }),
      shape("text", { x, y: y + 4 }, "\u25a6"));
  }
  svg.append(pressable(group, "Shape-only operations on both streams", () => visit(step.row)));
}

function drawEllipsis(svg, hidden, x, expand) {
  const group = shape("g");
  group.append(shape("rect", { class: "box", x: x - 42, y: MIDDLE - 17, width: 84, height: 34, rx: 17 }),
    shape("text", { x, y: MIDDLE + 5 }, `\u22ef ${hidden} more`));
  svg.append(pressable(group, `Show ${hidden} more branches`, expand));
}

function drawEnds(svg, width) {
  for (const [y, rail] of [[TOP, "first"], [BOTTOM, "second"]]) {
    svg.prepend(shape("path", { class: `rail ${rail}`,
      d: `M58 ${MIDDLE}C80 ${MIDDLE} 74 ${y} 104 ${y}H${width - 132}C${width - 104} ${y} ${width - 116} ${MIDDLE} ${width - 92} ${MIDDLE}` }));
  }
  svg.append(shape("circle", { class: "dot", cx: 58, cy: MIDDLE, r: 4.5 }),
    shape("text", { class: "state", x: 30, y: MIDDLE + 4 }, "input"),
    shape("text", { class: "state", x: 106, y: TOP - 12 }, "p\u2080"),
    shape("rect", { class: "box", x: width - 92, y: MIDDLE - 15, width: 70, height: 30, rx: 15 }),
    shape("text", { x: width - 57, y: MIDDLE + 5 }, "readout"));
}

// Which steps are drawn, each with the number of its branch; a number alone stands for so many left out.
function selection(steps, all) {
  let count = 0;
  const numbered = steps.map((step) => ({ step, number: step.coupling ? count++ : null }));
  if (all || count <= MOST) return numbered;
  const start = numbered.filter(({ number }) => number !== null && number < FROM_START);
  const end = numbered.filter(({ number }) => number !== null && number >= count - FROM_END);
  return [...start, count - FROM_START - FROM_END, ...end];
}

let arrows = 0;

function drawChain(chain, all, visit, expand) {
  const shown = selection(chain.steps, all);
  const advance = (entry) => (typeof entry === "number" ? STEP + 16 : entry.number === null ? GAP : STEP);
  const width = 260 + shown.reduce((sum, entry) => sum + advance(entry), 0);
  const svg = shape("svg", { width, height: BOTTOM + 66, viewBox: `0 0 ${width} ${BOTTOM + 66}`, role: "group",
    "aria-label": "Two streams with branches that jump between them" });
  svg.dataset.arrow = `arrow-${++arrows}`; // a reference into a folded drawing would show nothing
  const marker = shape("marker", { id: svg.dataset.arrow, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 7,
    markerHeight: 7, orient: "auto" });
  marker.append(shape("path", { d: "M0 0L8 4L0 8z", fill: "currentColor", opacity: 0.6 }));
  svg.append(marker);
  let x = 100;
  for (const entry of shown) {
    const size = advance(entry);
    x += size / 2;
    if (typeof entry === "number") drawEllipsis(svg, entry, x, expand);
    else if (entry.number === null) drawLink(svg, entry.step, x, visit);
    else drawBlock(svg, entry.step, entry.number, x, visit);
    x += size / 2;
  }
  drawEnds(svg, width);
  return svg;
}

function formula([a, b, c]) {
  const term = (factor, text) => (factor === 0 ? [] : [factor === 1 ? text : `${factor} ${text}`]);
  const parts = [...term(a, "p\u1d62"), ...term(b, "p\u1d62\u208b\u2081"), ...term(c, "F\u1d62(p\u1d62)")];
  return `p\u1d62\u208a\u2081 = ${parts.join(" + ")}`;
}

function chainElement(chain, number, visit) {
  const blocks = chain.steps.filter((step) => step.coupling);
  const first = blocks[0].module;
  const last = blocks.at(-1).module;
  const drawing = element("div", { class: "drawing", tabindex: "0", role: "region", "aria-label": `Chain ${number + 1}` });
  const draw = (all) => drawing.replaceChildren(drawChain(chain, all, visit, () => draw(true)));
  const details = element("details", { class: "chain", ...(number ? {} : { open: "" }) },
    element("summary", {}, `Chain ${number + 1} `, element("code", {}, first === last ? first : `${first} .. ${last}`),
      element("span", {}, `  ${blocks.length} residual${blocks.length === 1 ? "" : "s"}, two streams`)), drawing,
    element("p", { class: "formula" }, formula(blocks[0].coupling)));
  const once = () => details.open && !drawing.firstChild && draw(false);
  details.addEventListener("toggle", once);
  once();
  return details;
}

function wiringElement(chains, open, visit) {
  const residuals = chains.reduce((sum, chain) => sum + chain.steps.filter((step) => step.coupling).length, 0);
  const words = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  return element("details", open ? { open: "" } : {},
    element("summary", {}, "Reversible chains ", element("span", {}, `  ${words(chains.length, "chain")}, ${words(residuals, "residual")}`)),
    ...chains.map((chain, number) => chainElement(chain, number, visit)));
}
