// Says what a reader of the pages in this document's frames would trip over.

const colour = (words) => words.match(/[\d.]+/g).slice(0, 3).map(Number);
const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
const light = (rgb) =>
  rgb.reduce((sum, part, i) => sum + linear(part / 255) * [0.2126, 0.7152, 0.0722][i], 0);

function contrast(a, b) { // WCAG 2
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, found = [];
  const say = (what, node) => found.push(`${what}: ${node.textContent.trim().slice(0, 40)}`);
  const style = (node) => view.getComputedStyle(node);
  const paper = colour(style(page.body).backgroundColor);
  for (const svg of page.querySelectorAll("svg")) {
    const edge = svg.getBoundingClientRect(), seen = [];
    for (const node of svg.children) {
      const at = node.getBoundingClientRect();
      const inside = at.left > edge.left - 1 && at.right < edge.right + 1
        && at.top > edge.top - 1 && at.bottom < edge.bottom + 1;
      if (!inside) say(`${node.tagName} outside its figure`, node);
    }
    for (const text of svg.querySelectorAll("text")) {
      const at = text.getBoundingClientRect();
      for (const [other, was] of seen) {
        const across = Math.min(at.right, was.right) - Math.max(at.left, was.left);
        const down = Math.min(at.bottom, was.bottom) - Math.max(at.top, was.top);
        if (across > 1 && down > at.height / 3) say(`upon ${other.textContent}`, text);
      }
      seen.push([text, at]);
      if (contrast(colour(style(text).fill), paper) < 4.5) say("faint", text);
    }
  }
  for (const node of page.querySelectorAll("p, h1, h2, th, td, dt, dd, b, span, small, li, footer")) {
    const cut = style(node).display !== "inline" && node.scrollWidth > node.clientWidth + 1;
    if (cut) say("cut off", node);
    if (contrast(colour(style(node).color), paper) < 4.5) say("faint", node);
  }
  if (page.documentElement.scrollWidth > view.innerWidth) found.push("wider than its window");
  return found;
}

addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  const told = JSON.stringify({
    faults: frames.map(look),
    rendered: frames.map((frame) => frame.contentDocument.body.innerText),
    figures: frames.map((frame) => frame.contentDocument.querySelectorAll("svg").length),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  });
  document.body.replaceChildren(document.createTextNode(`<<<${told}>>>`));
});
