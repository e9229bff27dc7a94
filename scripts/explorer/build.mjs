// Build the explorer: one page that needs no server, no network and no other file.
//   node build.mjs           writes gradlab/study/explorer.html
//   node build.mjs --check   exits 1 where the committed page is not what these sources give
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import esbuild from "esbuild";
import katex from "katex";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const PAGE = here("../../gradlab/study/explorer.html");

/** Formulas are typeset here, as MathML, which browsers draw with fonts of their own and screen readers read. */
const tex = {
  name: "tex",
  setup(build) {
    build.onLoad({ filter: /\.tex\.json$/ }, ({ path }) => {
      const formulas = Object.entries(JSON.parse(readFileSync(path, "utf8")));
      const mathml = formulas.map(([name, source]) => {
        const drawn = katex.renderToString(source, { output: "mathml", throwOnError: true, strict: "error" });
        return [name, drawn.match(/<math[\s\S]*<\/math>/)[0].replace(/<annotation[\s\S]*?<\/annotation>/g, "")];
      });
      return { contents: JSON.stringify(Object.fromEntries(mathml)), loader: "json" };
    });
  },
};

async function bundle(entry, plugins = []) {
  const built = await esbuild.build({
    entryPoints: [here(entry)], bundle: true, minify: true, write: false, format: "iife", target: "es2022", charset: "utf8",
    legalComments: "none", plugins, logLevel: "warning",
  });
  return built.outputFiles[0].text.trim();
}

const style = await bundle("src/style.css");
const script = await bundle("src/main.js", [tex]);
const page = readFileSync(here("src/index.html"), "utf8")
  .replace("/* style */", () => style)
  .replace("/* script */", () => script);

if (process.argv.includes("--check")) {
  if (readFileSync(PAGE, "utf8") !== page) {
    console.error("gradlab/study/explorer.html is not what scripts/explorer gives: npm run build, there");
    process.exit(1);
  }
} else {
  writeFileSync(PAGE, page);
  console.log(`${PAGE}: ${(page.length / 1024).toFixed(0)} KiB`);
}
