//! One docked `tiny` machine with a witness in it, made once for all tests of a build.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use godwit_testkit::shared;

/// Where the substrate of this `program` and image is kept.
pub(crate) fn path(program: &Path, image: &Path) -> PathBuf {
    let mut key = DefaultHasher::new();
    let meta = std::fs::metadata(program).expect("the program");
    (meta.mtime(), meta.mtime_nsec(), meta.len(), program).hash(&mut key);
    std::fs::canonicalize(image).expect("the image").hash(&mut key);
    shared().join(format!("tiny-{:016x}.gwsa", key.finish()))
}

/// Removes the substrates of earlier builds of `program`.
pub(crate) fn forget_others(keep: &Path) {
    for entry in std::fs::read_dir(shared()).expect("reading").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "gwsa") && path != keep {
            // Another build's, which makes it again when it needs it.
            let _ = std::fs::remove_file(path);
        }
    }
}
