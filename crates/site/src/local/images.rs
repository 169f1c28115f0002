//! The images of this host.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use godwit_disk::BlockIndex;
use godwit_image::{Image, ImageCache, Recipe};
use godwit_types::{Code, Fault, Hash, Name};

use super::faults::{into_fault, join_error};
use super::record::MachineRecord;
use crate::{Call, ImageInfo, Progress};

/// Where the blocks of images are indexed, below their cache.
const INDEXED: &str = "indexed";

/// The images of one site.
#[derive(Debug)]
pub(super) struct Images {
    site: Name,
    cache: ImageCache,
    /// Images whose blocks are being indexed, or cannot be.
    indexing: Arc<Mutex<HashSet<Hash>>>,
}

impl Images {
    /// Those in a directory.
    pub(super) fn open(site: Name, dir: &Path) -> Result<Self, Fault> {
        let cache = ImageCache::open(dir).map_err(into_fault)?;
        Ok(Self { site, cache, indexing: Arc::default() })
    }

    /// The image of exactly that content, even when the name has moved on to a newer build.
    pub(super) fn of(&self, record: &MachineRecord) -> Result<Image, Fault> {
        let dir: PathBuf = self.cache.dir().join("by-hash").join(record.image_hash.to_string());
        if !dir.is_dir() {
            return Err(Fault::conflict(format!(
                "site '{}' does not hold image '{}' with the hash {}",
                self.site, record.image, record.image_hash
            ))
            .hint(format!(
                "build it there: godwit image build {} --site {}; a newer build has another hash",
                record.image, self.site
            )));
        }
        let image = Image::open(&dir).map_err(|e| Fault::of(&e))?;
        if image.hash == record.image_hash {
            return Ok(image);
        }
        let words = format!("{} holds an image with another hash", dir.display());
        Err(Fault::new(Code::Damaged, words))
    }

    /// As [`Images::of`], its files verified.
    pub(super) async fn sound(&self, record: &MachineRecord) -> Result<Image, Fault> {
        let (image, cache) = (self.of(record)?, self.cache.clone());
        let sound = tokio::task::spawn_blocking(move || cache.check(&image).map(|()| image))
            .await
            .map_err(join_error)?
            .map_err(into_fault)?;
        self.make_index(&sound);
        Ok(sound)
    }

    /// Where the blocks of an image's disk are indexed, once they are.
    pub(super) fn index_of(&self, image: &Image) -> Option<PathBuf> {
        Some(self.index_path(image)).filter(|path| path.exists())
    }

    fn index_path(&self, image: &Image) -> PathBuf {
        self.cache.dir().join(INDEXED).join(image.hash.to_string())
    }

    /// Indexes the blocks of an image's disk in the background, if they are not yet: a machine that
    /// moves only names those that are in its memory.
    fn make_index(&self, image: &Image) {
        let (Some(disk), path, hash) = (image.disk_path(), self.index_path(image), image.hash)
        else {
            return;
        };
        let begun = |set: &Mutex<HashSet<Hash>>| {
            !set.lock().unwrap_or_else(PoisonError::into_inner).insert(hash)
        };
        if path.exists() || begun(&self.indexing) {
            return;
        }
        let indexing = Arc::clone(&self.indexing);
        tokio::task::spawn_blocking(move || {
            let make = || {
                if let Some(dir) = path.parent() {
                    std::fs::create_dir_all(dir)?;
                }
                BlockIndex::build(&std::fs::File::open(&disk)?)?.save(&path)
            };
            match make() {
                Ok(()) => {
                    indexing.lock().unwrap_or_else(PoisonError::into_inner).remove(&hash);
                }
                // Not tried again by this process: moves are only slower.
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "an image's blocks are not indexed");
                }
            }
        });
    }

    /// The image of a machine may be damaged although nothing touched its files: they are read again,
    /// from the disk, in the background.
    pub(super) fn doubt(&self, record: &MachineRecord) {
        let (Ok(image), cache) = (self.of(record), self.cache.clone()) else { return };
        tokio::task::spawn_blocking(move || {
            if let Err(e) = cache.scrub(&image) {
                tracing::error!(image = %image.name, error = %godwit_types::chain(&e), "damaged");
            }
        });
    }

    /// Removes the indices of images that are gone.
    fn forget_indices(cache: &ImageCache) {
        let Ok(all) = std::fs::read_dir(cache.dir().join(INDEXED)) else { return };
        for entry in all.flatten() {
            // One that is being written is another's.
            if entry.file_name().to_string_lossy().contains(".new-") {
                continue;
            }
            if !cache.dir().join("by-hash").join(entry.file_name()).exists() {
                // Only a derived file.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// The newest build of an image, its files verified.
    pub(super) async fn newest(&self, name: &Name) -> Result<Image, Fault> {
        let (cache, name) = (self.cache.clone(), name.clone());
        let newest = tokio::task::spawn_blocking(move || {
            let image = cache.get(&name)?;
            cache.check(&image).map(|()| image)
        })
        .await
        .map_err(join_error)?
        .map_err(into_fault)?;
        self.make_index(&newest);
        Ok(newest)
    }

    /// Every image that is here, and every recipe.
    pub(super) async fn list(&self) -> Result<Vec<ImageInfo>, Fault> {
        let cache = self.cache.clone();
        tokio::task::spawn_blocking(move || images_of(&cache)).await.map_err(join_error)?
    }

    /// Builds an image from its recipe.
    pub(super) async fn build(&self, name: Name, call: Call) -> Result<ImageInfo, Fault> {
        let cancel = call.cancel.clone();
        let told = move |p: godwit_image::Progress| {
            call.progress(Progress {
                stage: p.stage.as_str().into(),
                done: p.fraction.map_or(0, |f| (f64::from(f) * 1000.0) as u64),
                total: if p.fraction.is_some() { 1000 } else { 0 },
                unit: "permille".into(),
                note: p.note,
            });
        };
        tokio::select! {
            // Dropping the build kills its tools and publishes nothing.
            () = cancel.cancelled() => Err(Fault::cancelled()),
            built = self.cache.build(&name, told) => {
                built.map(|i| image_info(&i)).map_err(|e| Fault::of(&e))
            }
        }
    }

    /// Removes every build of an image that nobody uses: `users` are those who do.
    pub(super) async fn remove(&self, name: Name, users: &[String]) -> Result<(), Fault> {
        if !users.is_empty() {
            return Err(in_use(&name, users));
        }
        let cache = self.cache.clone();
        let remove = move || cache.remove(&name).inspect(|()| Self::forget_indices(&cache));
        tokio::task::spawn_blocking(remove).await.map_err(join_error)?.map_err(into_fault)
    }

    /// The cache itself, to be read in the background.
    pub(super) const fn cache(&self) -> &ImageCache {
        &self.cache
    }
}

/// The images of a cache: those that are built, those that are there and cannot be used, and the
/// other recipes.
///
/// # Errors
/// The cache cannot be read.
pub fn images_of(cache: &ImageCache) -> Result<Vec<ImageInfo>, Fault> {
    let built = cache.list().map_err(|e| Fault::of(&e))?;
    let mut out: Vec<_> = built.iter().map(image_info).collect();
    for (info, image) in out.iter_mut().zip(&built) {
        info.fault = match cache.damage(image) {
            Ok(path) => path.map(|path| format!("{} is damaged; build it again", path.display())),
            Err(e) => Some(godwit_types::chain(&e)),
        };
        info.built = info.fault.is_none();
    }
    for name in Recipe::names() {
        if out.iter().any(|i| i.name == name) {
            continue;
        }
        let Ok(r) = Recipe::get(&name) else { continue };
        let fault = match cache.get(&name) {
            Ok(_) | Err(godwit_image::ImageError::NotBuilt { .. }) => None,
            Err(e) => Some(godwit_types::chain(&e)),
        };
        out.push(ImageInfo {
            hash: r.hash(),
            name,
            arch: r.arch,
            memory: r.memory,
            vcpus: r.vcpus,
            bytes: 0,
            display: r.display,
            app: r.app.clone(),
            built: false,
            fault,
        });
    }
    Ok(out)
}

/// What is told of an image that is built.
#[must_use]
pub fn image_info(i: &Image) -> ImageInfo {
    ImageInfo {
        name: i.name.clone(),
        hash: i.hash,
        arch: i.arch,
        memory: i.memory,
        vcpus: i.vcpus,
        bytes: i.files().map(|f| f.bytes).sum(),
        display: i.display,
        app: i.app.clone(),
        built: true,
        fault: None,
    }
}

/// The refusal to remove an image that is used, with who uses it.
pub fn in_use(image: &Name, users: &[String]) -> Fault {
    const SHOWN: usize = 5;
    let mut shown = users.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if users.len() > SHOWN {
        shown.push_str(&format!(" and {} more", users.len() - SHOWN));
    }
    Fault::conflict(format!("image '{image}' is in use by {shown}"))
        .hint("delete those first: godwit vm delete, godwit substrate delete")
}
