//! Images whose system runs from the initial RAM disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::apt::{Apt, RELEASE};
use crate::progress::{Listener, Stage, report};
use crate::recipe::Recipe;
use crate::tool::{self, DPKG_DEB, GCC, GCC_ARM64, Tool};
use crate::{ImageError, cpio, elf, guests, kernel, module};
use godwit_types::Arch;

/// Where shared libraries lie in unpacked Debian packages.
fn library_dirs(arch: Arch) -> [&'static str; 4] {
    match arch {
        Arch::X86_64 => ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "lib"],
        Arch::Aarch64 => ["lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu", "lib", "usr/lib"],
    }
}

fn loader(arch: Arch) -> (&'static str, &'static str) {
    match arch {
        Arch::X86_64 => ("lib64/ld-linux-x86-64.so.2", "ld-linux-x86-64.so.2"),
        Arch::Aarch64 => ("lib/ld-linux-aarch64.so.1", "ld-linux-aarch64.so.1"),
    }
}

/// The compiler for guest programs.
fn compiler(arch: Arch) -> Tool {
    match arch {
        Arch::Aarch64 if !cfg!(target_arch = "aarch64") => GCC_ARM64,
        _ => GCC,
    }
}

/// Kernel and initial RAM disk.
pub(crate) struct Boot {
    pub(crate) kernel: Vec<u8>,
    pub(crate) initrd: Vec<u8>,
    /// The packages that went in, as file names.
    pub(crate) packages: Vec<String>,
}

/// Builds kernel and initial RAM disk of an `initramfs` recipe in the scratch directory `work`.
pub(crate) async fn build(
    recipe: &Recipe,
    apt: &Apt,
    work: &Path,
    to: Listener<'_>,
) -> Result<Boot, ImageError> {
    let root = work.join("unpacked");
    let (kernel, version, mut packages) = unpack_kernel(recipe, apt, &root, to).await?;
    let debs = apt.download(RELEASE, &recipe.packages, to).await?;
    unpack(&debs, &root, to).await?;
    packages
        .extend(debs.iter().filter_map(|d| Some(d.file_name()?.to_string_lossy().into_owned())));

    report(to, Stage::Writing, None, "initial RAM disk");
    let mut archive = skeleton();
    add_programs(recipe, &root, &mut archive)?;
    for (name, content) in
        module::collect(&root.join("lib/modules").join(&version), &recipe.modules).await?
    {
        archive.module(&name, &content);
    }
    for (path, content) in overlay_files(recipe) {
        archive.inner.file(path, guests::mode_of(content), content);
    }
    for (name, program) in guest_programs(recipe.arch, work, to).await? {
        archive.inner.file(&format!("usr/lib/godwit/{name}"), 0o755, &program);
    }
    for name in GUEST_NAMES {
        archive.inner.link(&format!("usr/lib/godwit/{name}"), "godwit-guest");
    }
    Ok(Boot { kernel, initrd: archive.finish(), packages })
}

/// Fetches and unpacks the kernel package below `root`: the kernel to boot and its version.
pub(crate) async fn unpack_kernel(
    recipe: &Recipe,
    apt: &Apt,
    root: &Path,
    to: Listener<'_>,
) -> Result<(Vec<u8>, String, Vec<String>), ImageError> {
    report(to, Stage::Resolving, None, recipe.kernel.as_str());
    let package = apt.kernel(&recipe.kernel_suite, &recipe.kernel).await?;
    let debs = apt.download(&recipe.kernel_suite, std::slice::from_ref(&package), to).await?;
    unpack(&debs, root, to).await?;
    let version =
        package.trim_start_matches("linux-image-").trim_end_matches("-unsigned").to_owned();
    let path = root.join("boot").join(format!("vmlinuz-{version}"));
    let packed = std::fs::read(&path).map_err(ImageError::io("reading", &path))?;
    let names =
        debs.iter().filter_map(|d| Some(d.file_name()?.to_string_lossy().into_owned())).collect();
    Ok((kernel::bootable(packed).await?, version, names))
}

pub(crate) async fn unpack(
    debs: &[PathBuf],
    root: &Path,
    to: Listener<'_>,
) -> Result<(), ImageError> {
    for (i, deb) in debs.iter().enumerate() {
        let name = deb.file_name().unwrap_or_default().to_string_lossy();
        report(to, Stage::Installing, Some(i as f32 / debs.len() as f32), name.as_ref());
        let mut command = DPKG_DEB.command();
        command.arg("-x").arg(deb).arg(root);
        tool::run(DPKG_DEB, &mut command, &format!("unpacking {name}"), |_| {}).await?;
    }
    Ok(())
}

/// The files of the recipe's overlay folders; a later folder replaces an earlier one's file.
pub(crate) fn overlay_files(recipe: &Recipe) -> BTreeMap<&'static str, &'static [u8]> {
    let own = format!("{}/overlay", recipe.name);
    let folders = recipe.overlays.iter().map(String::as_str).chain([own.as_str()]);
    folders
        .flat_map(guests::below)
        .filter(|(path, _)| !["packages", "customize"].contains(path))
        .collect()
}

/// The names by which `godwit-guest` is called, links beside it.
pub(crate) const GUEST_NAMES: [&str; 2] = ["before-dock", "after-activate"];

/// Compiles the guest's own programs, static.
pub(crate) async fn guest_programs(
    arch: Arch,
    work: &Path,
    to: Listener<'_>,
) -> Result<Vec<(&'static str, Vec<u8>)>, ImageError> {
    let gcc = compiler(arch);
    let mut programs = Vec::new();
    for (name, source) in
        [("godwit-witness", "witness/witness.c"), ("godwit-guest", "witness/guest.c")]
    {
        report(to, Stage::Compiling, None, name);
        let text = guests::file(source).ok_or_else(|| ImageError::Recipe {
            name: name.into(),
            why: format!("{source} is missing"),
        })?;
        let (c, out) = (work.join(format!("{name}.c")), work.join(name));
        std::fs::write(&c, text).map_err(ImageError::io("writing", &c))?;
        let mut command = gcc.command();
        command.args(["-O2", "-static", "-pthread", "-s", "-o"]).arg(&out).arg(&c);
        tool::run(gcc, &mut command, &format!("compiling {name}"), |_| {}).await?;
        programs.push((name, std::fs::read(&out).map_err(ImageError::io("reading", &out))?));
    }
    Ok(programs)
}

/// An archive with modules and the order in which `init` loads them.
pub(crate) struct Ramdisk {
    pub(crate) inner: cpio::Archive,
    order: String,
}

impl Ramdisk {
    pub(crate) fn module(&mut self, name: &str, content: &[u8]) {
        self.inner.file(&format!("lib/modules/{name}.ko"), 0o644, content);
        self.order.push_str(&format!("{name}.ko\n"));
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inner.file("lib/modules/order", 0o644, self.order.as_bytes());
        self.inner.finish()
    }
}

/// Directories that every system starts with.
pub(crate) fn skeleton() -> Ramdisk {
    let mut inner = cpio::Archive::default();
    for dir in [
        "bin", "sbin", "usr/bin", "usr/sbin", "etc", "proc", "sys", "dev", "run", "data", "var",
        "lib",
    ] {
        inner.dir(dir, 0o755);
    }
    inner.dir("tmp", 0o1777);
    inner.char_device("dev/console", 0o600, 5, 1);
    inner.char_device("dev/null", 0o666, 1, 3);
    Ramdisk { inner, order: String::new() }
}

/// The recipe's files and every library that they need, found in the unpacked packages.
fn add_programs(recipe: &Recipe, root: &Path, archive: &mut Ramdisk) -> Result<(), ImageError> {
    let mut todo = Vec::new();
    for path in &recipe.files {
        let content = read_inside(root, path.trim_start_matches('/'))?;
        todo.extend(
            elf::needed(&content).unwrap_or_default().into_iter().map(|n| (n, path.clone())),
        );
        archive.inner.file(path, 0o755, &content);
    }
    let (loader_path, loader_name) = loader(recipe.arch);
    let mut done = BTreeSet::new();
    while let Some((library, by)) = todo.pop() {
        if !done.insert(library.clone()) {
            continue;
        }
        let found = library_dirs(recipe.arch)
            .iter()
            .find_map(|dir| read_inside(root, &format!("{dir}/{library}")).ok());
        let Some(content) = found else {
            return Err(ImageError::Package {
                what: format!("library {library}"),
                why: format!("{by} needs it and no package of the recipe holds it"),
            });
        };
        let needs = elf::needed(&content).unwrap_or_default();
        todo.extend(needs.into_iter().map(|n| (n, library.clone())));
        if library != loader_name {
            archive.inner.file(&format!("lib/{library}"), 0o755, &content);
        }
    }
    if !done.is_empty() {
        let dir = library_dirs(recipe.arch)[0];
        let content = read_inside(root, &format!("{dir}/{loader_name}"))?;
        archive.inner.file(loader_path, 0o755, &content);
    }
    Ok(())
}

/// Reads `path` below `root`. Links are followed inside `root` only, absolute ones too.
fn read_inside(root: &Path, path: &str) -> Result<Vec<u8>, ImageError> {
    let mut path = PathBuf::from(path);
    for _ in 0..8 {
        let full = root.join(&path);
        let meta = full.symlink_metadata().map_err(ImageError::io("reading", &full))?;
        if meta.is_file() {
            return std::fs::read(&full).map_err(ImageError::io("reading", &full));
        }
        let target = std::fs::read_link(&full).map_err(ImageError::io("reading", &full))?;
        let joined = match target.strip_prefix("/") {
            Ok(inside) => inside.to_owned(),
            Err(_) => path.parent().unwrap_or(Path::new("")).join(&target),
        };
        path = PathBuf::new();
        for part in joined.components() {
            match part {
                std::path::Component::Normal(p) => path.push(p),
                std::path::Component::ParentDir => {
                    path.pop();
                }
                _ => {}
            }
        }
    }
    Err(ImageError::Package { what: path.display().to_string(), why: "too many links".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_inside() {
        let dir = tempfile::tempdir().expect("temp dir");
        let lib = dir.path().join("lib");
        std::fs::create_dir(&lib).expect("writable");
        std::fs::write(lib.join("real"), "x").expect("writable");
        std::os::unix::fs::symlink("/lib/real", lib.join("absolute")).expect("writable");
        std::os::unix::fs::symlink("../../../../etc/passwd", lib.join("out")).expect("writable");
        std::os::unix::fs::symlink("loop", lib.join("loop")).expect("writable");
        assert_eq!(read_inside(dir.path(), "lib/absolute").expect("inside"), b"x");
        assert!(read_inside(dir.path(), "lib/out").is_err());
        assert!(read_inside(dir.path(), "lib/loop").is_err());
    }
}
