//! The base image: an ext4 file system in a sparse raw file.

use std::path::Path;

use godwit_types::{Hash, Mib};

use crate::{ImageError, tool};

/// Writes a file system of `size` to `to`, filled from the directory `from` where there is one.
/// Its UUID and hash seed come from `identity`, so that equal content gives equal bytes.
pub(crate) async fn write(
    to: &Path,
    size: Mib,
    label: &str,
    identity: Hash,
    from: Option<&Path>,
) -> Result<(), ImageError> {
    let uuid = uuid_of(identity);
    let mut command = tool::MKE2FS.command();
    command
        .env("E2FSPROGS_FAKE_TIME", "1")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L"])
        .arg(label.get(..16).unwrap_or(label))
        .args(["-U", &uuid])
        // Everything is initialised now: no background writes in the guest. No resize reserve.
        .args(["-E", &format!("hash_seed={uuid},lazy_itable_init=0,lazy_journal_init=0")])
        .args(["-O", "^resize_inode,^metadata_csum,uninit_bg"]);
    if let Some(from) = from {
        command.arg("-d").arg(from);
    }
    command.arg(to).arg(format!("{}M", size.0));
    tool::run(tool::MKE2FS, &mut command, &format!("making a file system of {size}"), |_| {}).await
}

fn uuid_of(hash: Hash) -> String {
    let text = hash.to_string();
    format!(
        "{}-{}-4{}-8{}-{}",
        &text[..8],
        &text[8..12],
        &text[13..16],
        &text[17..20],
        &text[20..32]
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[tokio::test]
    async fn a_file_system_is_sparse_and_repeatable() {
        let dir = tempfile::tempdir().expect("temp dir");
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).expect("writable");
        std::fs::write(tree.join("file"), "content").expect("writable");
        // Access times are part of an image, and the first one's making sets them: what is read is
        // marked as read once, until it changes (relatime).
        let (first, a, b) = (dir.path().join("first"), dir.path().join("a"), dir.path().join("b"));
        for to in [&first, &a, &b] {
            write(to, Mib(16), "label", Hash::of(b"x"), Some(&tree)).await.expect("made");
        }
        let meta = a.metadata().expect("there");
        assert_eq!(meta.len(), 16 << 20);
        assert!(meta.blocks() * 512 < 8 << 20);
        assert!(std::fs::read(&a).expect("a") == std::fs::read(&b).expect("b"), "the two differ");
    }
}
