"""`vit-jax explain WEIGHTS IMAGE ... --out PAGE`: why a network says what it says of images."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, add_heads

    help = "show what a network looks at on images"
    example = "vit-jax explain runs/photos photo.jpg --out page.html"
    parser = add_command(subparsers, "explain", run, help, example)
    add = parser.add_argument
    add("weights", help="a file or name of weights, or the workdir of a finished run")
    add("images", nargs="+", metavar="image", help="image files")
    out = (
        "the page to write: .png to print, .html to look around in, one file that needs no network"
    )
    add("--out", required=True, metavar="PAGE", help=out)
    classes = (
        "a class, by name or index, whose relevance is shown, in place of the two most "
        "probable; of LiT weights a text, one of those chosen from; may be given several times"
    )
    add("--class", dest="classes", action="append", metavar="CLASS", help=classes)
    add_heads(parser)
    add("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> None:
    """Writes the page and says what the network saw."""
    from vit_jax import explain, page
    from vit_jax.escape import printable, to_json
    from vit_jax.files import atomic_write
    from vit_jax.pretrained import load

    html = page.kind_of(args.out) == "html"
    vit = load(args.weights, heads=args.heads, window=args.window)
    explained = list(explain.explanations(vit, args.images, args.classes))
    if html:
        content = explain.page_html(vit, explained)
    else:
        content = page.png(explain.page_figure(vit, explained))
    with atomic_write(args.out) as out:
        out.write(content)
    if args.json:
        print(to_json([_record(e) for e in explained]))
        return
    for e in explained:
        answer = f": {e.classes[0][0]} ({e.classes[0][1]:.1%})" if e.classes else ""
        print(printable(f"{e.name}{answer}"))
    print(printable(f"page written to {args.out}"))


def _record(e) -> dict:
    """The numbers of an `Explanation`."""

    def rounded(values) -> list:
        return [[float(f"{x:.5g}") for x in row] for row in values.tolist()]

    return {
        "picture": e.name,
        "classes": [{"label": label, "probability": p} for label, p in e.classes],
        "rollout": rounded(e.rollout),
        "relevance": [{"label": label, "map": rounded(m)} for label, m in e.relevance],
    }
