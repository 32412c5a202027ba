"""The reference page of the tree, from the same docstrings as the READMEs in it.

`python -m fs.reference > docs/tree.md` writes it; a test holds it against the code.
"""

from fs.containers import ContainerDirectory, Net
from fs.content import Content, Sha256
from fs.image import ImageDirectory
from fs.images import Images
from fs.layers import LayerDirectory, Layers
from fs.nodes import Directory, describe
from fs.root import Root

PAGES: tuple[tuple[str, type[Directory]], ...] = (
    ("/", Root),
    ("/images/", Images),
    ("/images/NAME/", ImageDirectory),
    ("/images/NAME/layers/", Layers),
    ("/images/NAME/layers/N/", LayerDirectory),
    ("/content/", Content),
    ("/content/sha256/", Sha256),
    ("/containers/ID/", ContainerDirectory),
    ("/containers/ID/net/", Net),
)


def page() -> str:
    """The whole reference as Markdown; each README stands in it as it is in the tree."""
    parts = [
        "# The tree, file by file",
        "",
        "Written by `python -m fs.reference`; do not edit.",
        "",
    ]
    for path, directory in PAGES:
        parts += [f"## {path}", "", "```", describe(directory).rstrip(), "```", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
