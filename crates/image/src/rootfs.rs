//! Images with a Debian root file system on the disk. The kernel and its modules stay outside it:
//! a small initial RAM disk loads what is needed, mounts `/dev/vda` and hands over.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::apt::{Apt, RELEASE};
use crate::initramfs::{Boot, GUEST_NAMES, guest_programs, overlay_files, skeleton, unpack_kernel};
use crate::progress::{Listener, Stage, report};
use crate::recipe::Recipe;
use crate::tool::{self, MMDEBSTRAP};
use crate::{ImageError, disk, guests, module};

/// Documentation and translations take a third of the space and are never read in a guest.
const LEFT_OUT: &str = "path-exclude=/usr/share/{doc,man,locale,info,lintian,help}/*";

/// Builds the root file system of a `debian` recipe into `disk_path`, and what boots it.
pub(crate) async fn build(
    recipe: &Recipe,
    apt: &Apt,
    work: &Path,
    disk_path: &Path,
    to: Listener<'_>,
) -> Result<Boot, ImageError> {
    if !rustix::process::geteuid().is_root() {
        return Err(ImageError::NeedsRoot { name: recipe.name.clone() });
    }
    let mut packages = recipe.all_packages();
    report(to, Stage::Resolving, None, format!("{} packages and what they need", packages.len()));
    let mut wanted = packages.clone();
    wanted.extend(["?essential".to_owned(), "apt".into()]);
    let names: Vec<String> = apt
        .closure(RELEASE, &wanted)
        .await?
        .iter()
        .filter_map(|file| Some(file.split('_').next()?.to_owned()))
        .collect();
    let debs = apt.download(RELEASE, &names, to).await?;

    let unpacked = work.join("unpacked");
    let (kernel, version, mut used) = unpack_kernel(recipe, apt, &unpacked, to).await?;
    used.extend(debs.iter().filter_map(|d| Some(d.file_name()?.to_string_lossy().into_owned())));

    let overlay = work.join("overlay");
    for (path, content) in overlay_files(recipe) {
        put(&overlay.join(path), content, guests::mode_of(content))?;
    }
    for (name, program) in guest_programs(recipe.arch, work, to).await? {
        put(&overlay.join("usr/lib/godwit").join(name), &program, 0o755)?;
    }
    for name in GUEST_NAMES {
        let path = overlay.join("usr/lib/godwit").join(name);
        std::os::unix::fs::symlink("godwit-guest", &path)
            .map_err(ImageError::io("linking", &path))?;
    }

    let root = work.join("root");
    packages.sort();
    install(recipe, apt, &packages, &debs, work, &overlay, &root, to).await?;
    report(to, Stage::Writing, None, "disk");
    disk::write(disk_path, recipe.disk, recipe.name.as_str(), recipe.hash(), Some(&root)).await?;

    report(to, Stage::Writing, None, "initial RAM disk");
    let mut ramdisk = skeleton();
    let busybox = apt.download(RELEASE, &["busybox-static".to_owned()], to).await?;
    crate::initramfs::unpack(&busybox, &unpacked, to).await?;
    let path = unpacked.join("bin/busybox");
    let busybox = std::fs::read(&path).map_err(ImageError::io("reading", &path))?;
    ramdisk.inner.file("bin/busybox", 0o755, &busybox);
    if let Some(folder) = &recipe.initramfs {
        for (path, content) in guests::below(folder) {
            ramdisk.inner.file(path, guests::mode_of(content), content);
        }
    }
    for (name, content) in
        module::collect(&unpacked.join("lib/modules").join(&version), &recipe.modules).await?
    {
        ramdisk.module(&name, &content);
    }
    Ok(Boot { kernel, initrd: ramdisk.finish(), packages: used })
}

/// Runs mmdebstrap with the packages that were fetched, the overlay, and the `customize` scripts.
#[allow(clippy::too_many_arguments, reason = "one call, each argument another thing")]
async fn install(
    recipe: &Recipe,
    apt: &Apt,
    packages: &[String],
    debs: &[std::path::PathBuf],
    work: &Path,
    overlay: &Path,
    root: &Path,
    to: Listener<'_>,
) -> Result<(), ImageError> {
    // Hooks get their paths from files and directories beside them, never inside the shell text.
    let archives = work.join("archives");
    std::fs::create_dir(&archives).map_err(ImageError::io("creating", &archives))?;
    for deb in debs {
        let to = archives.join(deb.file_name().unwrap_or_default());
        std::fs::hard_link(deb, &to).map_err(ImageError::io("linking", &to))?;
    }
    let own = recipe.name.as_str();
    let mut hooks = Vec::new();
    for folder in recipe.overlays.iter().map(String::as_str).chain([own]) {
        if let Some(script) = guests::file(&format!("{folder}/customize")) {
            let path = work.join(format!("customize-{folder}"));
            put(&path, script, 0o755)?;
            hooks.push(path);
        }
    }
    let mut command = MMDEBSTRAP.command();
    command
        .args(["--mode=root", "--variant=minbase", "--format=directory", "--verbose"])
        .arg(format!("--architectures={}", recipe.debian_arch()))
        .arg(format!("--include={}", packages.join(",")))
        .args(["--skip=download/empty,essential/unlink,check/qemu"])
        .args([
            "--aptopt=APT::Install-Recommends \"false\"",
            "--aptopt=APT::Sandbox::User \"root\"",
        ])
        .args(["--aptopt=Acquire::Languages \"none\"", "--aptopt=Acquire::Retries \"3\""])
        .arg("--dpkgopt=force-unsafe-io");
    let (before, after) = LEFT_OUT.split_once('{').unwrap_or((LEFT_OUT, ""));
    let (parts, after) = after.split_once('}').unwrap_or((after, ""));
    for part in parts.split(',') {
        command.arg(format!("--dpkgopt={before}{part}{after}"));
    }
    command
        .env("GODWIT_ARCHIVES", &archives)
        .env("GODWIT_OVERLAY", overlay)
        .arg("--setup-hook=mkdir -p \"$1/var/cache/apt/archives\" && cp \"$GODWIT_ARCHIVES\"/*.deb \"$1/var/cache/apt/archives/\"")
        .arg("--customize-hook=cp -R --preserve=mode \"$GODWIT_OVERLAY\"/. \"$1\"/");
    for hook in &hooks {
        command.arg(format!("--customize-hook={}", hook.display()));
    }
    command.arg(RELEASE).arg(root).arg(apt.sources_file());

    let steps = (2 * debs.len()).max(1) as f32;
    let mut done = 0;
    tool::run(MMDEBSTRAP, &mut command, &format!("installing {own}"), |line| {
        let at = line.strip_prefix("Unpacking ").or_else(|| line.strip_prefix("Setting up "));
        if let Some(rest) = at {
            done += 1;
            let package = rest.split([' ', ':']).next().unwrap_or_default();
            report(to, Stage::Installing, Some((done as f32 / steps).min(1.0)), package);
        }
        tracing::trace!(line, "mmdebstrap");
    })
    .await
}

fn put(path: &Path, content: &[u8], mode: u32) -> Result<(), ImageError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(ImageError::io("creating", parent))?;
    }
    std::fs::write(path, content).map_err(ImageError::io("writing", path))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(ImageError::io("writing", path))
}
