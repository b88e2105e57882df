"""A page of results whose parts are measured one at a time: what was not measured now stays as it stands."""


def written(path, title, headings, new):
    """Write the page anew.

    Args:
        path: of the page.
        title: its first line.
        headings: of all parts, in order, each beginning with `## `.
        new: text by heading, of the parts that were measured now.

    Returns:
        The whole text.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = {one: old.split(one)[1].split("\n## ")[0].strip() for one in headings if one in old}
    parts = kept | new
    text = "\n\n".join([f"# {title}", *(f"{one}\n\n{parts[one]}" for one in headings if one in parts)]) + "\n"
    path.write_text(text, encoding="utf-8")
    return text
