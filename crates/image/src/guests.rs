//! The recipes and guest files that were embedded when the library was built.

include!(concat!(env!("OUT_DIR"), "/guests.rs"));

/// The embedded file at `path`, relative to `guests/`.
pub(crate) fn file(path: &str) -> Option<&'static [u8]> {
    FILES.binary_search_by(|(name, _)| (*name).cmp(path)).ok().map(|i| FILES[i].1)
}

/// All files below the folder `dir`: the path below it, and the content.
pub(crate) fn below(dir: &str) -> impl Iterator<Item = (&'static str, &'static [u8])> {
    let prefix = format!("{dir}/");
    FILES.iter().filter_map(move |(name, content)| Some((name.strip_prefix(&prefix)?, *content)))
}

/// Permission bits of an embedded guest file: what starts as a script is executable.
pub(crate) fn mode_of(content: &[u8]) -> u32 {
    if content.starts_with(b"#!") { 0o755 } else { 0o644 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_path() {
        assert!(file("tiny/recipe.toml").is_some());
        assert!(file("tiny/missing").is_none());
        let scripts: Vec<_> = below("common").collect();
        assert!(
            scripts.iter().any(|(p, c)| *p == "usr/lib/godwit/identity" && mode_of(c) == 0o755)
        );
        assert!(scripts.iter().any(|(p, c)| *p == "usr/lib/godwit/lib.sh" && mode_of(c) == 0o644));
    }
}
