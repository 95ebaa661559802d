/** Small helpers for elements, shared by the page's modules. */

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button with an icon; `label` is its text, or its accessible name if `silent`. */
export function iconButton(name, label, onClick, { silent = false, className = "quiet small" } = {}) {
  const button = element("button", { type: "button", className }, icon(name));
  if (silent) Object.assign(button, { title: label, ariaLabel: label });
  else button.append(element("span", { textContent: label }));
  button.addEventListener("click", onClick);
  return button;
}

export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text());
    button.lastElementChild.textContent = done ? "Copied" : "Not copied";
    button.firstElementChild.firstElementChild.setAttribute("href", done ? "#i-check" : "#i-copy");
    setTimeout(() => {
      button.lastElementChild.textContent = label;
      button.firstElementChild.firstElementChild.setAttribute("href", "#i-copy");
    }, 1500);
  });
  return button;
}

/** Copies to the clipboard. navigator.clipboard exists only over HTTPS and on localhost. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", { value: text, className: "sr" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Opens a dialog. -> whether its form was submitted. */
export function ask(dialog) {
  const form = dialog.querySelector("form");
  return new Promise((resolve) => {
    let submitted = false;
    form.onsubmit = (event) => {
      event.preventDefault();
      submitted = true;
      dialog.close();
    };
    dialog.querySelector("[data-close]").onclick = () => dialog.close();
    dialog.onclose = () => resolve(submitted);
    dialog.showModal();
  });
}
