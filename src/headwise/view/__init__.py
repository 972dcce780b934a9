"""The explorer: a local page on which a model's heads can be looked at, compared, taken out and exported.

`headwise view DIR --model smollm2` serves it; `make_app` builds it. The rooms below: `library` reads files, `live` asks the model,
`compare` and `points` set things side by side, `explorer` joins them without a page; `page`, `on_*` and `server` are the page.
"""
