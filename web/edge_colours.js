// The colours of the pack's own edges: their links, their slots, on light and on dark palettes.

import { app } from "../../scripts/app.js";

const COLOURS = {
  DIFFSCALER_TASK: { dark: "#2fd6c3", light: "#00796b" },
  DIFFSCALER_TRAINING: { dark: "#c5e063", light: "#5e7500" },
  DIFFSCALER_GUIDANCE: { dark: "#ff9e80", light: "#b23c17" },
};

/** Frontends have marked dark palettes on the root or on the body. */
const isDark = () => [document.documentElement, document.body]
  .some((element) => element.classList.contains("dark-theme"));

/** Each palette empties the colours of the types it does not know: an entry then answers ours. */
function answer(table, type, { dark, light }) {
  let given = table[type]; // by a palette that does know the type
  Object.defineProperty(table, type, {
    get: () => given || (isDark() ? dark : light),
    set: (colour) => { given = colour; },
    enumerable: true,
    configurable: true,
  });
}

/** Nodes made of HTML read a variable, which a palette that knows the type sets on the root. */
function styleSheet() {
  const rules = Object.entries(COLOURS).map(([type, { dark, light }]) => {
    const variable = `--color-datatype-${type}`;
    return `:root { ${variable}: ${light} }
      :root.dark-theme, :root:has(body.dark-theme) { ${variable}: ${dark} }`;
  });
  return Object.assign(document.createElement("style"), { textContent: rules.join("\n") });
}

app.registerExtension({
  name: "DiffScaler.EdgeColours",
  setup() {
    const { canvas } = app;
    for (const [type, colours] of Object.entries(COLOURS)) {
      answer(canvas.default_connection_color_byType, type, colours); // slots
      answer(canvas.constructor.link_type_colors, type, colours); // links
    }
    document.head.append(styleSheet());
  },
});
