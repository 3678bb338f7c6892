"""The Space of the Parallel Decoder Transformer: decoding behind a page, without the page's layout."""
