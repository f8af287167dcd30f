const number = (value, digits = 4) => value === null ? "–" : String(Number(value.toPrecision(digits)));

function make(tag, text, kind, within) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (kind) element.className = kind;
  if (within) within.append(element);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
function draw(tag, attributes, within, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  within.append(element);
  return element;
}

// Round numbers from low to high, some four of them.
function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, n) => Number(((first + n) * step).toPrecision(12)));
}
