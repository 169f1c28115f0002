//! What ARCHITECTURE.md and SPECIFICATION.md say of the sources themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Lines that one file may have.
const LINES: usize = 800;
/// Methods that one type of `site` and `cloud` may have, those of traits included.
const METHODS: usize = 40;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

fn sources(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(below).expect("reading").map(|e| e.expect("an entry")) {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && name != ".git" {
            found.append(&mut sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// The type that this line begins an `impl` of.
fn implemented(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("impl")?;
    // Parameters of the impl, which may hold others: `impl<T: Into<U>> ...`.
    let mut depth = 0;
    let after = rest.find(|c| {
        depth += i32::from(c == '<') - i32::from(c == '>');
        depth == 0 && c == ' '
    })?;
    let named = &rest[after + 1..];
    let named = named.split_once(" for ").map_or(named, |(_, named)| named);
    let named = named.trim_start_matches(['&', '(']);
    named.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

fn is_method(line: &str) -> bool {
    let Some(line) = line.strip_prefix("    ").filter(|l| !l.starts_with([' ', '/'])) else {
        return false;
    };
    line.split_once("fn ").is_some_and(|(before, _)| {
        let known = ["const", "async", "unsafe"];
        before
            .split_whitespace()
            .all(|w| w.starts_with("pub") || known.contains(&w) || w.ends_with(')'))
    })
}

fn methods(of: &str) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for path in sources(&root().join("crates").join(of).join("src")) {
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("tests")) {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a source");
        let mut current = None;
        for line in text.lines().take_while(|line| !line.starts_with("mod tests {")) {
            if line.starts_with("impl") {
                current = implemented(line);
            } else if line == "}" {
                current = None;
            } else if let Some(named) = current
                && is_method(line)
            {
                *all.entry(named.to_owned()).or_insert(0) += 1;
            }
        }
    }
    all
}

#[test]
fn no_type_of_a_site_or_a_center_has_more_methods_than_one_head_can_hold() {
    for (room, known) in [("site", "Machines"), ("cloud", "Registry")] {
        let all = methods(room);
        assert!(all[known] > 20, "methods are counted: {all:?}");
        let large: Vec<_> = all.iter().filter(|(_, n)| **n > METHODS).collect();
        assert!(large.is_empty(), "split what has over {METHODS} methods: {large:?}");
    }
}

#[test]
fn no_file_is_longer_than_one_head_can_hold() {
    let rooms = ["crates", "bench", "tests", "fuzz"].map(|room| sources(&root().join(room)));
    let lines = |path: &PathBuf| std::fs::read_to_string(path).expect("a source").lines().count();
    let all = rooms.concat();
    assert!(all.len() > 300, "{} files", all.len());
    let long: Vec<_> = all.iter().map(|p| (p, lines(p))).filter(|(_, n)| *n > LINES).collect();
    assert!(long.is_empty(), "split what has over {LINES} lines: {long:?}");
}
