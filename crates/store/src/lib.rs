//! Content-addressed store of pages and disk blocks.
