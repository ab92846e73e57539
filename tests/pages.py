"""What the tests of pages in a browser share: the browser, and what a reader needs of any page."""

import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Every visible text whose contrast with what is behind it is below that of WCAG 2.2, level AA (1.4.3). Colours are read
# from a canvas, which knows every notation. Disabled controls are exempt.
FAINT = """
() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (color, below) => {
    context.fillStyle = `rgb(${below.join(" ")})`;
    context.fillRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const behind = (element) => {
    const layers = [];
    for (let own = element; own; own = own.parentElement) layers.push(getComputedStyle(own).backgroundColor);
    const page = matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
    return layers.reverse().reduce((below, color) => over(color, below), page);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || element.closest("script, style, template, option, :disabled") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), below = behind(element);
    const color = over(element instanceof SVGElement ? style.fill : style.color, below);
    const [light, dark] = [luminance(color), luminance(below)].sort((one, other) => other - one);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (light + 0.05) / (dark + 0.05);
    seen += 1;
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
  }
  return { seen, found };
}
"""


def faint_texts(page) -> list[str]:
    """The texts of a page that are too faint to read, each with its contrast; the page must have some text."""
    answer = page.evaluate(FAINT)
    assert answer["seen"] > 5
    return answer["found"]


def sideways(page) -> int:
    """By how many pixels a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def focused(page, presses: int) -> list[str]:
    """What the focus reaches by pressing Tab: the names or texts of the elements."""
    found = []
    for _ in range(presses):
        page.keyboard.press("Tab")
        found.append(
            page.evaluate(
                "() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent.trim()"
            )
        )
    return found
