//! One docked `tiny` machine with a witness in it, made once for all tests of a build.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use godwit_testkit::shared;

fn digest(of: impl Hash) -> u64 {
    let mut key = DefaultHasher::new();
    of.hash(&mut key);
    key.finish()
}

/// How the names of all substrates begin that builds at the place of this `program` made.
fn prefix(program: &Path) -> String {
    format!("tiny-{:016x}-", digest(program))
}

/// Where the substrate of this `program` and image is kept.
pub(crate) fn path(program: &Path, image: &Path) -> PathBuf {
    let meta = std::fs::metadata(program).expect("the program");
    let image = std::fs::canonicalize(image).expect("the image");
    let build = digest((meta.mtime(), meta.mtime_nsec(), meta.len(), image));
    shared().join(format!("{}{build:016x}.gwsa", prefix(program)))
}

/// Removes the substrates of earlier builds of `program`. Those of other programs stay: tests of another
/// working tree may be about to read one.
pub(crate) fn forget_others(program: &Path, keep: &Path) {
    let prefix = prefix(program);
    for entry in std::fs::read_dir(shared()).expect("reading").flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix));
        if ours && path != keep {
            // One that is gone already is what is wanted.
            let _ = std::fs::remove_file(path);
        }
    }
}
