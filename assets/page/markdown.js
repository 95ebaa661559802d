/** Markdown to sanitised elements. Only the blocks that changed are made again while an answer streams. */

import { copyButton, element } from "./elements.js";

const { Marked } = window.marked;
const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const markdown = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text), // markup in an answer is shown, not interpreted
    image: ({ text, href }) => escape(text || href), // nothing is loaded on behalf of a model
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});
const ALLOWED = {
  ALLOWED_TAGS: "a p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ADD_URI_SAFE_ATTR: ["align", "start"], // not addresses
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** Keeps `root` equal to `text`, and the elements of unchanged blocks as they are. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.blocks = []; // {raw, node} of each top-level block
  }

  update(text) {
    const tokens = markdown.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
    let same = 0;
    while (same < tokens.length && same < this.blocks.length && this.blocks[same].raw === tokens[same].raw) same++;
    for (const { node } of this.blocks.splice(same)) node.remove();
    for (const token of tokens.slice(same)) {
      const node = element("div", { className: "block" });
      node.append(finished(window.DOMPurify.sanitize(markdown.parser([token]), ALLOWED)));
      this.root.append(node);
      this.blocks.push({ raw: token.raw, node });
    }
  }
}

/** Adds what sanitised elements lack: safe links, copy buttons, tables and code that scroll by keyboard. */
function finished(fragment) {
  for (const link of fragment.querySelectorAll("a")) {
    if (link.hasAttribute("href")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
    else link.replaceWith(...link.childNodes); // the sanitiser removed its address
  }
  for (const heading of fragment.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const lower = element("h3", { className: `level-${heading.localName[1]}` });
    lower.append(...heading.childNodes);
    heading.replaceWith(lower);
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.textContent.replace(/\n$/, "");
    const language = /language-([\w+#.-]+)/.exec(pre.firstElementChild?.className || "")?.[1] || "";
    const box = element("div", { className: "code" });
    const bar = element("div", { className: "bar" }, element("span", { textContent: language || "code" }));
    bar.append(copyButton("Copy", () => code));
    pre.replaceWith(box);
    box.append(bar, scrollable(pre, `Code${language ? ` in ${language}` : ""}`));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = element("div", { className: "table" });
    table.replaceWith(box);
    box.append(table);
    scrollable(box, "Table");
  }
  return fragment;
}

function scrollable(node, label) {
  node.tabIndex = 0;
  node.setAttribute("role", "region");
  node.setAttribute("aria-label", label);
  return node;
}
