// The pack's style sheet, added to the page once.

export function addStyles() {
  const href = new URL("./diffscaler.css", import.meta.url).href;
  if (document.querySelector(`link[href="${href}"]`)) return;
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = href;
  document.head.append(link);
}
