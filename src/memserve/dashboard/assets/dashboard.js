// Arrows between members' cards, drawn where the cards are, and the choice of light or dark.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  let flows = [];

  function make(name, attributes) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  }

  // The middle of the side of a card that faces another one, and the direction out of it.
  function side(from, to) {
    const dx = to.x + to.width / 2 - from.x - from.width / 2;
    const dy = to.y + to.height / 2 - from.y - from.height / 2;
    if (Math.abs(dx) * from.height > Math.abs(dy) * from.width || Math.abs(dx) > from.width) {
      const right = dx > 0;
      return [from.x + (right ? from.width : 0), from.y + from.height / 2, right ? 1 : -1, 0];
    }
    const down = dy > 0;
    return [from.x + from.width / 2, from.y + (down ? from.height : 0), 0, down ? 1 : -1];
  }

  // Whether two cards are in one row with others between them, which an arrow must not cross.
  function across(from, to) {
    return Math.abs(from.y - to.y) < from.height / 2 && Math.abs(from.x - to.x) > 1.8 * from.width;
  }

  // Whether two cards are in one column with others between them: the table tells of such flows.
  function above(from, to) {
    return Math.abs(from.x - to.x) < from.width / 2 && Math.abs(from.y - to.y) > 1.8 * from.height;
  }

  // An arrow over the cards between two, or below them if KV is given back.
  function arc(svg, flow, from, to) {
    const out = flow.kind === "forward" ? -1 : 1;
    const edge = (box) => box.y + (out < 0 ? 0 : box.height);
    const inwards = from.x < to.x ? 1 : -1;
    const x1 = from.x + from.width / 2 + 12 * inwards, x2 = to.x + to.width / 2 - 12 * inwards;
    const height = 16 + Math.abs(x2 - x1) / 40;
    svg.append(make("path", { class: flow.kind, "stroke-width": 1.5 + 3 * Math.sqrt(flow.share),
      "marker-end": `url(#head-${flow.kind})`,
      d: `M${x1} ${edge(from)} C${x1} ${edge(from) + out * height} ` +
        `${x2} ${edge(to) + out * height} ${x2} ${edge(to)}` }));
    const text = make("text", { x: (x1 + x2) / 2, "text-anchor": "middle",
      y: edge(from) + out * 0.75 * height + (out < 0 ? -4 : 12) });
    text.textContent = flow.label;
    svg.append(text);
  }

  function draw() {
    const root = document.querySelector(".hosts");
    if (!root) return;
    root.querySelector("svg.flows")?.remove();
    const svg = make("svg", { class: "flows", role: "img", "aria-label": "KV between members" });
    const defs = make("defs", {});
    for (const kind of ["forward", "returned"]) {
      const marker = make("marker", { id: `head-${kind}`, viewBox: "0 0 8 8", refX: 6, refY: 4,
        markerWidth: 14, markerHeight: 14, markerUnits: "userSpaceOnUse", orient: "auto" });
      const colour = kind === "forward" ? "var(--accent)" : "var(--pinned)";
      marker.append(make("path", { d: "M0 0 L8 4 L0 8 z",
        style: `fill: ${colour}; stroke: none; opacity: 1` }));
      defs.append(marker);
    }
    svg.append(defs);
    const base = root.getBoundingClientRect();
    const boxes = new Map();
    for (const card of root.querySelectorAll("[data-member]")) {
      const box = card.getBoundingClientRect();
      boxes.set(card.dataset.member,
        { x: box.x - base.x, y: box.y - base.y, width: box.width, height: box.height });
    }
    for (const flow of flows) {
      const from = boxes.get(flow.source), to = boxes.get(flow.target);
      if (!from || !to) continue;
      const shift = flow.kind === "forward" ? -9 : 9;  // both ways between two are both seen
      if (above(from, to)) continue;
      if (across(from, to)) {
        arc(svg, flow, from, to);
        continue;
      }
      let [x1, y1, ox1, oy1] = side(from, to);
      let [x2, y2, ox2, oy2] = side(to, from);
      x1 += oy1 ? shift : 0; x2 += oy2 ? shift : 0;
      y1 += ox1 ? shift : 0; y2 += ox2 ? shift : 0;
      const bend = Math.max(18, Math.hypot(x2 - x1, y2 - y1) / 3);
      const width = 1.5 + 3 * Math.sqrt(flow.share);
      svg.append(make("path", { class: flow.kind, "stroke-width": width,
        "marker-end": `url(#head-${flow.kind})`,
        d: `M${x1} ${y1} C${x1 + ox1 * bend} ${y1 + oy1 * bend} ` +
          `${x2 + ox2 * bend} ${y2 + oy2 * bend} ${x2} ${y2}` }));
      // Between cards above each other the labels are beside the arrows.
      const place = oy1 && oy2
        ? { x: (x1 + x2) / 2 + shift, y: (y1 + y2) / 2 + 4, "text-anchor": shift < 0 ? "end" : "start" }
        : { x: (x1 + x2) / 2, y: (y1 + y2) / 2 + (shift > 0 ? 14 : -5), "text-anchor": "middle" };
      const text = make("text", place);
      text.textContent = flow.label;
      svg.append(text);
    }
    root.append(svg);
  }

  window.memserveFlows = (given) => { flows = given; requestAnimationFrame(draw); };
  addEventListener("resize", () => requestAnimationFrame(draw));

  // Lists are drawn anew each second: who moves through them by keyboard stays at the same link.
  let focused = null;
  addEventListener("focusin", (event) => {
    focused = event.target.matches("table.list a") ? event.target.getAttribute("href") : null;
  });
  addEventListener("pointerdown", () => { focused = null; });
  new MutationObserver(() => {
    if (focused === null || document.activeElement !== document.body) return;
    document.querySelector(`table.list a[href="${CSS.escape(focused)}"]`)
      ?.focus({ preventScroll: true });
  }).observe(document.documentElement, { childList: true, subtree: true });

  // auto -> light -> dark; kept in this browser.
  const KEY = "memserve-dashboard-colours";
  window.memserveColours = () => localStorage.getItem(KEY) || "auto";
  window.memserveNextColours = () => {
    const order = ["auto", "light", "dark"];
    const next = order[(order.indexOf(window.memserveColours()) + 1) % 3];
    localStorage.setItem(KEY, next);
    return next;
  };
})();
