//! The image cache of a machine.
//!
//! ```text
//! <cache>/by-hash/<hash>/image.json, kernel, initrd, disk, packages.txt   never changed
//! <cache>/<name> -> by-hash/<hash>                                        moved by rename
//! <cache>/verified/<hash>       that its files were read, when they had been touched before that,
//!                               and which had another hash than it should
//! <cache>/debs/, apt/<arch>/    fetched packages and lists, shared by all builds
//! <cache>/work                  builds in progress; left-overs of a crash are removed
//! ```

use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use godwit_types::{Hash, Name};
use rustix::fs::{FlockOperation, flock};

use crate::apt::Apt;
use crate::image::{Contents, FORMAT, hash_file};
use crate::progress::{Listener, Progress, Stage, report};
use crate::recipe::{Kind, Recipe};
use crate::{FileRef, Image, ImageError, disk, initramfs, rootfs};

/// Where images lie unless something else is asked for.
pub const DEFAULT_CACHE: &str = "/var/cache/godwit/images";

/// The images of this machine, and what is needed to build them.
#[derive(Debug, Clone)]
pub struct ImageCache {
    dir: PathBuf,
    downloads: PathBuf,
    /// What this process has found of each image: when its files were touched, and which of them
    /// was damaged.
    seen: Arc<Mutex<Seen>>,
}

/// When the files of each image were touched, and which of them was damaged.
type Seen = HashMap<Hash, (String, Option<String>)>;

/// Before the damaged file in what is kept of an image that was verified.
const DAMAGED: &str = "damaged ";

impl ImageCache {
    /// Opens the cache in `dir` and creates it where it is missing.
    ///
    /// # Errors
    /// [`ImageError::Io`] when the directory cannot be made.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, ImageError> {
        let dir = dir.into();
        for part in ["by-hash", "work"] {
            let path = dir.join(part);
            std::fs::create_dir_all(&path).map_err(ImageError::io("creating", &path))?;
        }
        let dir = dir.canonicalize().map_err(ImageError::io("opening", &dir))?;
        Ok(Self { downloads: dir.clone(), dir, seen: Arc::default() })
    }

    /// Keeps fetched packages and package lists in `downloads` instead of in the cache itself, so
    /// that several caches share them.
    ///
    /// # Errors
    /// [`ImageError::Io`] when the directory cannot be made.
    pub fn with_downloads(self, downloads: &Path) -> Result<Self, ImageError> {
        std::fs::create_dir_all(downloads).map_err(ImageError::io("creating", downloads))?;
        let downloads = downloads.canonicalize().map_err(ImageError::io("opening", downloads))?;
        Ok(Self { downloads, ..self })
    }

    /// Where the cache lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The built image called `name`.
    ///
    /// # Errors
    /// [`ImageError::NotBuilt`], or what [`Image::open`] says.
    pub fn get(&self, name: &Name) -> Result<Image, ImageError> {
        let link = self.dir.join(name.as_str());
        // The link is read once, so that a build in between cannot mix two images.
        let Ok(target) = std::fs::read_link(&link) else {
            return Err(ImageError::NotBuilt { name: name.clone() });
        };
        let hash =
            target.strip_prefix("by-hash").ok().and_then(|h| h.to_str()?.parse::<Hash>().ok());
        let Some(hash) = hash else {
            return Err(ImageError::Description {
                path: link,
                why: "it does not lead into by-hash".into(),
            });
        };
        let image = Image::open(&self.dir.join("by-hash").join(hash.to_string()))?;
        if image.hash != hash || image.name != *name {
            return Err(ImageError::Description {
                path: link,
                why: "it leads to another image".into(),
            });
        }
        Ok(image)
    }

    /// Reads the files of `image` and compares them with their hashes, unless that was done before
    /// and none of them was touched since. Blocks, the first time for as long as reading takes. A
    /// bit that the disk turned over by itself touches nothing: [`ImageCache::scrub`] finds it.
    ///
    /// # Errors
    /// As [`Image::verify`].
    pub fn check(&self, image: &Image) -> Result<(), ImageError> {
        let now = image.touched()?;
        if let Some((then, fault)) = self.known(image)
            && then == now
        {
            return fault.map_or(Ok(()), |why| Err(self.found_damaged(image, why)));
        }
        self.verify(image, now)
    }

    /// The file of `image` that is damaged, if one is, by what [`ImageCache::check`] finds.
    ///
    /// # Errors
    /// [`ImageError::Io`] when a file cannot be read.
    pub fn damage(&self, image: &Image) -> Result<Option<PathBuf>, ImageError> {
        let now = image.touched()?;
        match self.known(image) {
            Some((then, fault)) if then == now => Ok(fault.map(PathBuf::from)),
            _ => match self.verify(image, now) {
                Err(ImageError::Damaged { path, .. }) => Ok(Some(path)),
                done => done.map(|()| None),
            },
        }
    }

    /// Reads the files of `image` from the disk, as far as the kernel lets go of what it holds of
    /// them, and compares them with their hashes, whatever was found before.
    ///
    /// # Errors
    /// As [`Image::verify`].
    pub fn scrub(&self, image: &Image) -> Result<(), ImageError> {
        image.let_go();
        self.verify(image, image.touched()?)
    }

    fn verify(&self, image: &Image, now: String) -> Result<(), ImageError> {
        let found = image.verify();
        let fault = match &found {
            Ok(()) => None,
            Err(ImageError::Damaged { path, .. }) => Some(path.display().to_string()),
            Err(_) => return found,
        };
        // Touched while it was read: the next one reads it again.
        if image.touched()? == now {
            self.note(image, now, fault);
        }
        found
    }

    /// What was last found of an image, and when its files were touched before that: those of this
    /// process, or of another that used the cache.
    fn known(&self, image: &Image) -> Option<(String, Option<String>)> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = seen.get(&image.hash) {
            return Some(found.clone());
        }
        drop(seen);
        let text = std::fs::read_to_string(self.stamp(image)).ok()?;
        Some(match text.split_once(DAMAGED) {
            Some((then, why)) => (then.to_owned(), Some(why.trim_end().to_owned())),
            None => (text, None),
        })
    }

    fn note(&self, image: &Image, now: String, fault: Option<String>) {
        let text = match &fault {
            Some(why) => format!("{now}{DAMAGED}{why}\n"),
            None => now.clone(),
        };
        let stamp = self.stamp(image);
        let kept = std::fs::create_dir_all(self.dir.join("verified"))
            .and_then(|()| std::fs::write(&stamp, text));
        if let Err(error) = kept {
            tracing::info!(%error, path = %stamp.display(), "other processes verify it again");
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(image.hash, (now, fault));
    }

    fn stamp(&self, image: &Image) -> PathBuf {
        self.dir.join("verified").join(image.hash.to_string())
    }

    fn found_damaged(&self, image: &Image, path: String) -> ImageError {
        let path = PathBuf::from(path);
        let wanted = image
            .files()
            .find(|f| path.file_name().is_some_and(|name| name == f.file.as_str()))
            .map(|f| f.hash);
        match (wanted, hash_file(&path)) {
            (Some(wanted), Ok((found, _))) => ImageError::Damaged { path, found, wanted },
            _ => ImageError::Description { path, why: "it was found damaged".into() },
        }
    }

    /// All built images, by name. One that cannot be opened is left out and logged.
    ///
    /// # Errors
    /// [`ImageError::Io`] when the cache cannot be read.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let mut images = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(ImageError::io("reading", &self.dir))? {
            let entry = entry.map_err(ImageError::io("reading", &self.dir))?;
            let is_link = entry.file_type().is_ok_and(|t| t.is_symlink());
            let Some(name) =
                entry.file_name().to_str().and_then(|n| Name::new(n).ok()).filter(|_| is_link)
            else {
                continue;
            };
            match self.get(&name) {
                Ok(image) => images.push(image),
                Err(error) => tracing::warn!(%name, %error, "image cannot be used"),
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// Removes the image called `name` and its older builds. Fetched packages stay. Who uses them
    /// is the caller's to know.
    ///
    /// # Errors
    /// [`ImageError::NotBuilt`] when there is none, [`ImageError::Busy`] while a build is running.
    pub fn remove(&self, name: &Name) -> Result<(), ImageError> {
        let path = self.dir.join("work/lock");
        let building = File::create(&path).map_err(ImageError::io("creating", &path))?;
        if flock(&building, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(ImageError::Busy { dir: self.dir.clone() });
        }
        let link = self.dir.join(name.as_str());
        let linked = std::fs::read_link(&link).ok();
        let all = self.dir.join("by-hash");
        let mut builds = Vec::new();
        for entry in std::fs::read_dir(&all).map_err(ImageError::io("reading", &all))? {
            let dir = entry.map_err(ImageError::io("reading", &all))?.path();
            // Also one whose files are damaged, if the name leads to it.
            let current = linked.as_ref().is_some_and(|l| self.dir.join(l) == dir);
            if current || Image::open(&dir).is_ok_and(|i| i.name == *name) {
                builds.push(dir);
            }
        }
        if linked.is_none() && builds.is_empty() {
            return Err(ImageError::NotBuilt { name: name.clone() });
        }
        // The name first: nobody finds half an image.
        if linked.is_some() {
            std::fs::remove_file(&link).map_err(ImageError::io("removing", &link))?;
        }
        for dir in builds {
            if let Some(hash) = dir.file_name() {
                // Only says that a file need not be read again.
                let _ = std::fs::remove_file(self.dir.join("verified").join(hash));
            }
            std::fs::remove_dir_all(&dir).map_err(ImageError::io("removing", &dir))?;
        }
        Ok(())
    }

    /// The image called `name`, built if it is not there or its recipe has changed since.
    ///
    /// Dropping the future gives the build up: its tools are killed and nothing is published;
    /// packages already fetched stay for the next try.
    ///
    /// # Errors
    /// What is missing, or which tool failed; see [`ImageError`].
    pub async fn build(
        &self,
        name: &Name,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<Image, ImageError> {
        self.make(name, false, &progress).await
    }

    /// Builds the image called `name` from what the mirrors hold now, even if it is there.
    ///
    /// # Errors
    /// As [`ImageCache::build`].
    pub async fn rebuild(
        &self,
        name: &Name,
        progress: impl Fn(Progress) + Send + Sync,
    ) -> Result<Image, ImageError> {
        self.make(name, true, &progress).await
    }

    async fn make(&self, name: &Name, again: bool, to: Listener<'_>) -> Result<Image, ImageError> {
        let recipe = Recipe::get(name)?;
        let sound = |i: &Image| matches!(self.damage(i), Ok(None));
        let current =
            || self.get(name).ok().filter(|i| !again && i.recipe == recipe.hash() && sound(i));
        if let Some(image) = current() {
            report(to, Stage::Done, Some(1.0), "already built");
            return Ok(image);
        }
        // One build at a time, and one that uses the downloads.
        let _building = lock(&self.dir.join("work/lock"), to).await?;
        let _fetching = lock(&self.downloads.join("downloads.lock"), to).await?;
        if let Some(image) = current() {
            report(to, Stage::Done, Some(1.0), "already built");
            return Ok(image);
        }
        self.clear_left_overs()?;
        let work = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(self.dir.join("work"))
            .map_err(ImageError::io("creating a directory in", self.dir.join("work")))?;
        let image = self.fill(&recipe, work.path(), to).await?;
        report(to, Stage::Done, Some(1.0), image.hash.short());
        Ok(image)
    }

    async fn fill(
        &self,
        recipe: &Recipe,
        work: &Path,
        to: Listener<'_>,
    ) -> Result<Image, ImageError> {
        let apt = Apt::open(&self.downloads, recipe.debian_arch())?;
        apt.update(to).await?;
        let out = work.join("image");
        std::fs::create_dir(&out).map_err(ImageError::io("creating", &out))?;
        let disk_path = out.join("disk");
        let boot = match recipe.kind {
            Kind::Initramfs => {
                let boot = initramfs::build(recipe, &apt, work, to).await?;
                report(to, Stage::Writing, None, "disk");
                disk::write(&disk_path, recipe.disk, recipe.name.as_str(), recipe.hash(), None)
                    .await?;
                boot
            }
            Kind::Debian => rootfs::build(recipe, &apt, work, &disk_path, to).await?,
        };
        for (file, content) in [("kernel", &boot.kernel), ("initrd", &boot.initrd)] {
            let path = out.join(file);
            std::fs::write(&path, content).map_err(ImageError::io("writing", &path))?;
        }
        let packages = out.join("packages.txt");
        let text = boot.packages.join("\n") + "\n";
        std::fs::write(&packages, text).map_err(ImageError::io("writing", &packages))?;

        report(to, Stage::Publishing, None, "hashing");
        let (recipe, cache) = (recipe.clone(), self.dir.clone());
        let published = tokio::task::spawn_blocking(move || publish(&recipe, &cache, &out));
        let image = published.await.map_err(|e| ImageError::Io {
            doing: "publishing",
            path: self.dir.clone(),
            source: e.into(),
        })??;
        // Its files were hashed a moment ago.
        self.note(&image, image.touched()?, None);
        Ok(image)
    }

    /// Removes what a build that was killed left behind. The lock is held, so none is running.
    fn clear_left_overs(&self) -> Result<(), ImageError> {
        let work = self.dir.join("work");
        for entry in std::fs::read_dir(&work).map_err(ImageError::io("reading", &work))? {
            let path = entry.map_err(ImageError::io("reading", &work))?.path();
            if path.is_dir() {
                std::fs::remove_dir_all(&path).map_err(ImageError::io("removing", &path))?;
            }
        }
        Ok(())
    }
}

/// Holds the lock file at `path` until the answer is dropped.
async fn lock(path: &Path, to: Listener<'_>) -> Result<File, ImageError> {
    let file = File::create(path).map_err(ImageError::io("creating", path))?;
    let mut reported = false;
    // flock has no waiting that could be given up, hence the short looks.
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if !reported {
            report(to, Stage::Waiting, None, "another build is running");
            reported = true;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(file)
}

/// Hashes the files in `out`, describes them, and moves them to where images lie.
fn publish(recipe: &Recipe, cache: &Path, out: &Path) -> Result<Image, ImageError> {
    let describe = |file: &str| {
        let path = out.join(file);
        std::fs::set_permissions(&path, Permissions::from_mode(0o444))
            .map_err(ImageError::io("protecting", &path))?;
        let (hash, bytes) = hash_file(&path)?;
        Ok::<_, ImageError>(FileRef { file: file.into(), hash, bytes })
    };
    let contents = Contents {
        format: FORMAT,
        name: recipe.name.clone(),
        arch: recipe.arch,
        kernel: describe("kernel")?,
        initrd: Some(describe("initrd")?),
        disk: Some(describe("disk")?),
        cmdline: recipe.cmdline.clone(),
        memory: recipe.memory,
        vcpus: recipe.vcpus,
        display: recipe.display,
        agent: true,
        app: recipe.app.clone(),
        recipe: recipe.hash(),
        packages: Some(describe("packages.txt")?),
    };
    let description = out.join("image.json");
    std::fs::write(&description, contents.description())
        .map_err(ImageError::io("writing", &description))?;
    for entry in std::fs::read_dir(out).map_err(ImageError::io("reading", out))? {
        let path = entry.map_err(ImageError::io("reading", out))?.path();
        File::open(&path).and_then(|f| f.sync_all()).map_err(ImageError::io("writing", &path))?;
    }
    let hash = contents.hash().to_string();
    let home = cache.join("by-hash").join(&hash);
    std::fs::set_permissions(out, Permissions::from_mode(0o755))
        .map_err(ImageError::io("protecting", out))?;
    if Image::open(&home).and_then(|there| there.verify()).is_err() {
        // Something damaged may lie there; an image of this hash has these bytes and no others.
        let _ = std::fs::remove_dir_all(&home);
        std::fs::rename(out, &home).map_err(ImageError::io("publishing", &home))?;
    }
    let link = cache.join("work").join(format!("link-{hash}"));
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(Path::new("by-hash").join(&hash), &link)
        .map_err(ImageError::io("writing", &link))?;
    let name = cache.join(recipe.name.as_str());
    std::fs::rename(&link, &name).map_err(ImageError::io("publishing", &name))?;
    Image::open(&home)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    /// A cache with an image that no guest boots.
    fn built() -> (ImageCache, Image, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("tempdir");
        let cache = ImageCache::open(dir.path()).expect("cache");
        let out = cache.dir().join("work/out");
        std::fs::create_dir(&out).expect("mkdir");
        for file in ["kernel", "initrd", "disk", "packages.txt"] {
            std::fs::write(out.join(file), format!("what is in {file}").repeat(999))
                .expect("write");
        }
        let recipe = Recipe::get(&Name::new("tiny").expect("valid")).expect("a recipe");
        let image = publish(&recipe, cache.dir(), &out).expect("published");
        (cache, image, dir)
    }

    fn flip(path: &Path) {
        std::fs::set_permissions(path, Permissions::from_mode(0o644)).expect("writable");
        let file = File::options().read(true).write(true).open(path).expect("opened");
        let mut byte = [0];
        file.read_exact_at(&mut byte, 1000).expect("read");
        file.write_all_at(&[byte[0] ^ 1], 1000).expect("written");
    }

    #[test]
    fn a_bit_flipped_in_any_file_is_found_and_remembered_until_it_is_touched_again() {
        let (cache, image, dir) = built();
        cache.check(&image).expect("sound");
        assert_eq!(cache.damage(&image).expect("readable"), None);
        for file in ["kernel", "initrd", "disk", "packages.txt"] {
            let path = image.dir().join(file);
            flip(&path);
            assert_eq!(cache.damage(&image).expect("readable"), Some(path.clone()));
            // By what is known, by another process, and read anew.
            let other = ImageCache::open(dir.path()).expect("cache");
            for e in [cache.check(&image), other.check(&image), cache.scrub(&image)] {
                let e = e.expect_err("damaged");
                assert!(matches!(&e, ImageError::Damaged { path: p, .. } if *p == path), "{e}");
            }
            assert_eq!(other.damage(&image).expect("readable"), Some(path.clone()));
            flip(&path);
            cache.check(&image).expect("sound again");
        }
    }
}
