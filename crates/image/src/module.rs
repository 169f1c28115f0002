//! Kernel modules and what they depend on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{ImageError, tool};

/// Modules in the order in which they have to be loaded: name and content.
pub(crate) type Modules = Vec<(String, Vec<u8>)>;

/// Collects the modules `wanted` and everything they depend on from `lib/modules/<version>`.
/// A module that is built into the kernel is left out; one that is neither there nor built in is
/// an error.
pub(crate) async fn collect(dir: &Path, wanted: &[String]) -> Result<Modules, ImageError> {
    let files = find(dir)?;
    let built_in = built_in(dir)?;
    let mut done: Modules = Vec::new();
    // Depth first; an entry comes off when all that it depends on is done.
    let mut stack: Vec<(String, Option<Vec<u8>>)> =
        wanted.iter().rev().map(|name| (key(name), None)).collect();
    while let Some((name, content)) = stack.pop() {
        if done.iter().any(|(n, _)| *n == name) || built_in.contains(&name) {
            continue;
        }
        if let Some(content) = content {
            done.push((name, content));
            continue;
        }
        let Some(path) = files.get(&name) else {
            return Err(ImageError::Package {
                what: format!("kernel module {name}"),
                why: format!("{} does not hold it", dir.display()),
            });
        };
        let content = if path.extension().is_some_and(|e| e == "xz") {
            tool::xz_decompress(path).await?
        } else {
            std::fs::read(path).map_err(ImageError::io("reading", path))?
        };
        let needs = depends(&content);
        if stack.len() > 1000 {
            return Err(ImageError::Package {
                what: format!("kernel module {name}"),
                why: "its dependencies run in a circle".into(),
            });
        }
        stack.push((name, Some(content)));
        stack.extend(needs.into_iter().filter(|n| files.contains_key(n)).map(|n| (n, None)));
    }
    Ok(done)
}

/// `virtio-rng` and `virtio_rng` are the same module.
fn key(name: &str) -> String {
    name.replace('-', "_")
}

fn find(dir: &Path) -> Result<BTreeMap<String, PathBuf>, ImageError> {
    let mut files = BTreeMap::new();
    let mut dirs = vec![dir.join("kernel")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).map_err(ImageError::io("reading", &dir))? {
            let entry = entry.map_err(ImageError::io("reading", &dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().map_err(ImageError::io("reading", entry.path()))?.is_dir() {
                dirs.push(entry.path());
            } else if let Some(stem) = name.strip_suffix(".ko").or(name.strip_suffix(".ko.xz")) {
                files.insert(key(stem), entry.path());
            }
        }
    }
    Ok(files)
}

fn built_in(dir: &Path) -> Result<Vec<String>, ImageError> {
    let path = dir.join("modules.builtin");
    let text = std::fs::read_to_string(&path).map_err(ImageError::io("reading", &path))?;
    Ok(text.lines().filter_map(|l| Some(key(l.rsplit('/').next()?.strip_suffix(".ko")?))).collect())
}

/// The modules named by `depends=` and by `softdep=pre:` in a module's `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    for part in module.split(|b| *b == 0) {
        let Ok(text) = std::str::from_utf8(part) else { continue };
        if let Some(list) = text.strip_prefix("depends=") {
            names.extend(list.split(',').filter(|n| !n.is_empty()).map(key));
        } else if let Some(list) = text.strip_prefix("softdep=pre:") {
            let pre = list.split("post:").next().unwrap_or_default();
            names.extend(pre.split_whitespace().map(key));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp dir");
        let kernel = dir.path().join("kernel/drivers");
        std::fs::create_dir_all(&kernel).expect("writable");
        std::fs::write(dir.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n")
            .expect("writable");
        for (name, depends) in modules {
            std::fs::write(
                kernel.join(format!("{name}.ko")),
                format!("\x7fELF\0depends={depends}\0"),
            )
            .expect("writable");
        }
        dir
    }

    #[tokio::test]
    async fn what_a_module_needs_comes_before_it() {
        let dir = tree(&[
            ("failover", ""),
            ("net_failover", "failover"),
            ("virtio-net", "net_failover"),
            ("other", ""),
        ]);
        let wanted = ["virtio_net".to_owned(), "ext4".into(), "failover".into()];
        let got = collect(dir.path(), &wanted).await.expect("all there");
        let names: Vec<_> = got.iter().map(|m| m.0.as_str()).collect();
        assert_eq!(names, ["failover", "net_failover", "virtio_net"]);
    }

    #[tokio::test]
    async fn a_missing_module_and_a_circle_are_errors() {
        let dir = tree(&[("a", "b"), ("b", "a")]);
        assert!(collect(dir.path(), &["none".into()]).await.is_err());
        assert!(collect(dir.path(), &["a".into()]).await.is_err());
    }
}
