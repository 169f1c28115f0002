//! A built image on disk: `image.json` and the files that it names.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use godwit_types::{Arch, Hash, Mib, Name};
use serde::{Deserialize, Serialize};

use crate::ImageError;

/// The longest `image.json` that is read.
const MAX_DESCRIPTION_BYTES: u64 = 64 << 10;
/// The longest kernel command line; Linux on x86-64 takes 2048 bytes with the final zero.
const MAX_CMDLINE_BYTES: usize = 2047;
const MAX_MEMORY: Mib = Mib(1 << 20);
const MAX_VCPUS: u8 = 64;

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// File name inside the image's directory; one plain path component.
    pub file: String,
    /// BLAKE3 of the content.
    pub hash: Hash,
    /// Size in bytes; for a sparse disk its full length.
    pub bytes: u64,
}

/// A guest image: everything a machine boots from. Guests boot their kernel directly; the disk, a
/// raw ext4 file system without a partition table, is `/dev/vda` and never written to: machines
/// put a cow image on top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The recipe's name.
    pub name: Name,
    /// Guest architecture.
    pub arch: Arch,
    /// Hash of the canonical JSON of all other fields: the image's identity.
    pub hash: Hash,
    /// For `-kernel`.
    pub kernel: FileRef,
    /// For `-initrd`.
    pub initrd: Option<FileRef>,
    /// The base image, raw and sparse.
    pub disk: Option<FileRef>,
    /// For `-append`.
    pub cmdline: String,
    /// Memory that the guest is made for.
    pub memory: Mib,
    /// vCPUs that the guest is made for.
    pub vcpus: u8,
    /// Whether the guest shows something on a display.
    pub display: bool,
    /// Whether the guest agent runs in it.
    pub agent: bool,
    /// The program on the display.
    pub app: Option<String>,
    /// Hash of the recipe and the files that it was built with.
    pub recipe: Hash,
    /// The packages that it was made of, one a line; older images do not name the file.
    pub packages: Option<FileRef>,
    dir: PathBuf,
}

/// What is hashed; field order is part of the format.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contents {
    pub(crate) format: u32,
    pub(crate) name: Name,
    pub(crate) arch: Arch,
    pub(crate) kernel: FileRef,
    pub(crate) initrd: Option<FileRef>,
    pub(crate) disk: Option<FileRef>,
    pub(crate) cmdline: String,
    pub(crate) memory: Mib,
    pub(crate) vcpus: u8,
    pub(crate) display: bool,
    pub(crate) agent: bool,
    pub(crate) app: Option<String>,
    pub(crate) recipe: Hash,
    /// Left out where it is not known, so that the hash of an older image stays what it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) packages: Option<FileRef>,
}

/// `image.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    hash: Hash,
    contents: Contents,
}

/// Version of `image.json`. 1: the first.
pub(crate) const FORMAT: u32 = 1;

impl Contents {
    /// The identity of an image with these contents.
    pub(crate) fn hash(&self) -> Hash {
        Hash::of(&serde_json::to_vec(self).expect("plain fields always serialise"))
    }

    /// The text of `image.json`.
    pub(crate) fn description(&self) -> Vec<u8> {
        let whole = Description { hash: self.hash(), contents: self.clone() };
        serde_json::to_vec_pretty(&whole).expect("plain fields always serialise")
    }

    /// Why these contents cannot be an image's, if so.
    fn fault(&self) -> Option<String> {
        if self.format != FORMAT {
            return Some(format!("format {} is not known, {FORMAT} is", self.format));
        }
        let files =
            [Some(&self.kernel), self.initrd.as_ref(), self.disk.as_ref(), self.packages.as_ref()];
        for file in files.into_iter().flatten() {
            let mut parts = Path::new(&file.file).components();
            let plain = matches!(parts.next(), Some(Component::Normal(_)))
                && parts.next().is_none()
                && file.file.len() <= 64
                && file.file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            if !plain {
                return Some(format!("file name {:?} is not a plain one", file.file));
            }
        }
        if self.cmdline.len() > MAX_CMDLINE_BYTES || self.cmdline.chars().any(char::is_control) {
            return Some("the kernel command line is too long or holds control characters".into());
        }
        if self.memory == Mib(0) || self.memory > MAX_MEMORY {
            return Some(format!("memory of {} is out of range", self.memory));
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Some(format!("{} vCPUs are out of range", self.vcpus));
        }
        None
    }
}

impl Image {
    /// Reads and checks the description in `dir`. The files themselves are checked for presence
    /// and size only; [`Image::verify`] reads them.
    ///
    /// # Errors
    /// [`ImageError::Io`] when something cannot be read, [`ImageError::Description`] when it is
    /// not a whole and sound image.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let path = dir.join("image.json");
        let bad = |why: String| ImageError::Description { path: path.clone(), why };
        let file = File::open(&path).map_err(ImageError::io("reading", &path))?;
        let mut text = Vec::new();
        file.take(MAX_DESCRIPTION_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(ImageError::io("reading", &path))?;
        let image = Self::parse(&text, dir)?;
        for file in image.files() {
            let path = dir.join(&file.file);
            let meta = path.symlink_metadata().map_err(ImageError::io("reading", &path))?;
            if !meta.is_file() || meta.len() != file.bytes {
                return Err(bad(format!("{} is not a file of {} bytes", file.file, file.bytes)));
            }
        }
        Ok(image)
    }

    /// Checks `text`, the description of an image that lies in `dir`. No file is looked at.
    ///
    /// # Errors
    /// [`ImageError::Description`] when it is not that of a sound image.
    pub fn parse(text: &[u8], dir: &Path) -> Result<Self, ImageError> {
        let bad = |why: String| ImageError::Description { path: dir.join("image.json"), why };
        if text.len() as u64 > MAX_DESCRIPTION_BYTES {
            return Err(bad(format!("it is longer than {MAX_DESCRIPTION_BYTES} bytes")));
        }
        let whole: Description = serde_json::from_slice(text).map_err(|e| bad(e.to_string()))?;
        if let Some(why) = whole.contents.fault() {
            return Err(bad(why));
        }
        if whole.contents.hash() != whole.hash {
            return Err(bad("its contents do not match its hash".into()));
        }
        Ok(Self::from_contents(whole.contents, dir.to_owned()))
    }

    /// Reads every file and compares it with its hash. Takes as long as reading the disk does:
    /// call it from a blocking thread.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] names the first file that differs.
    pub fn verify(&self) -> Result<(), ImageError> {
        for file in self.files() {
            let path = self.dir.join(&file.file);
            let (found, _) = hash_file(&path)?;
            if found != file.hash {
                return Err(ImageError::Damaged { path, found, wanted: file.hash });
            }
        }
        Ok(())
    }

    /// When its files were last touched in any way: their place, length and times of change.
    pub(crate) fn touched(&self) -> Result<String, ImageError> {
        use std::fmt::Write as _;
        use std::os::unix::fs::MetadataExt as _;
        let mut text = String::new();
        for file in self.files() {
            let path = self.dir.join(&file.file);
            let m = path.symlink_metadata().map_err(ImageError::io("reading", &path))?;
            let _ = writeln!(
                text,
                "{} {} {} {} {}.{} {}.{}",
                file.file,
                m.dev(),
                m.ino(),
                m.size(),
                m.mtime(),
                m.mtime_nsec(),
                m.ctime(),
                m.ctime_nsec()
            );
        }
        Ok(text)
    }

    fn from_contents(c: Contents, dir: PathBuf) -> Self {
        Self {
            hash: c.hash(),
            name: c.name,
            arch: c.arch,
            kernel: c.kernel,
            initrd: c.initrd,
            disk: c.disk,
            cmdline: c.cmdline,
            memory: c.memory,
            vcpus: c.vcpus,
            display: c.display,
            agent: c.agent,
            app: c.app,
            recipe: c.recipe,
            packages: c.packages,
            dir,
        }
    }

    /// Where the image lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kernel.
    #[must_use]
    pub fn kernel_path(&self) -> PathBuf {
        self.dir.join(&self.kernel.file)
    }

    /// The initial RAM disk.
    #[must_use]
    pub fn initrd_path(&self) -> Option<PathBuf> {
        self.initrd.as_ref().map(|f| self.dir.join(&f.file))
    }

    /// The base image.
    #[must_use]
    pub fn disk_path(&self) -> Option<PathBuf> {
        self.disk.as_ref().map(|f| self.dir.join(&f.file))
    }

    /// All files.
    pub fn files(&self) -> impl Iterator<Item = &FileRef> {
        [Some(&self.kernel), self.initrd.as_ref(), self.disk.as_ref(), self.packages.as_ref()]
            .into_iter()
            .flatten()
    }

    /// Asks the kernel to let go of what it holds of the files, so that they are read from the disk.
    pub(crate) fn let_go(&self) {
        for file in self.files() {
            if let Ok(file) = File::open(self.dir.join(&file.file)) {
                // Advice: what is in use stays.
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
            }
        }
    }

    /// Bytes that the files take on the disk; holes of the base image do not count.
    ///
    /// # Errors
    /// [`ImageError::Io`] when a file cannot be read.
    pub fn stored_bytes(&self) -> Result<u64, ImageError> {
        use std::os::unix::fs::MetadataExt as _;
        self.files().try_fold(0, |sum, file| {
            let path = self.dir.join(&file.file);
            let meta = path.metadata().map_err(ImageError::io("reading", &path))?;
            Ok(sum + meta.blocks() * 512)
        })
    }
}

/// Hash and length of a file's content.
pub(crate) fn hash_file(path: &Path) -> Result<(Hash, u64), ImageError> {
    let mut file = File::open(path).map_err(ImageError::io("reading", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; 4 << 20];
    let mut bytes = 0;
    loop {
        let mut filled = 0;
        while filled < chunk.len() {
            match file.read(&mut chunk[filled..]).map_err(ImageError::io("reading", path))? {
                0 => break,
                n => filled += n,
            }
        }
        hasher.update_rayon(&chunk[..filled]);
        bytes += filled as u64;
        if filled < chunk.len() {
            return Ok((Hash(*hasher.finalize().as_bytes()), bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn contents() -> Contents {
        let file = |name: &str, text: &str| FileRef {
            file: name.into(),
            hash: Hash::of(text.as_bytes()),
            bytes: text.len() as u64,
        };
        Contents {
            format: FORMAT,
            name: Name::new("sample").expect("valid"),
            arch: Arch::X86_64,
            kernel: file("kernel", "k"),
            initrd: None,
            disk: Some(file("disk", "disk")),
            cmdline: "quiet".into(),
            memory: Mib(256),
            vcpus: 1,
            display: false,
            agent: true,
            app: None,
            recipe: Hash::of(b"recipe"),
            packages: None,
        }
    }

    fn stored(description: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp dir");
        for (name, text) in [("kernel", "k"), ("disk", "disk")] {
            std::fs::write(dir.path().join(name), text).expect("writable");
        }
        std::fs::write(dir.path().join("image.json"), description).expect("writable");
        dir
    }

    #[test]
    fn an_image_opens_as_it_was_described() {
        let dir = stored(&contents().description());
        let image = Image::open(dir.path()).expect("sound");
        assert_eq!((image.hash, image.memory), (contents().hash(), Mib(256)));
        assert_eq!(image.kernel_path(), dir.path().join("kernel"));
        image.verify().expect("whole");
    }

    #[test]
    fn a_file_that_was_touched_is_read_again() {
        let at = tempfile::tempdir().expect("temp dir");
        let cache = crate::ImageCache::open(at.path()).expect("a cache");
        let dir = stored(&contents().description());
        let image = Image::open(dir.path()).expect("sound");
        cache.check(&image).expect("whole");
        assert!(at.path().join("verified").join(image.hash.to_string()).is_file());
        cache.check(&image).expect("not touched since");
        std::fs::write(dir.path().join("disk"), "dosk").expect("writable");
        match cache.check(&image) {
            Err(ImageError::Damaged { path, .. }) => assert_eq!(path, dir.path().join("disk")),
            other => panic!("{other:?}"),
        }
        std::fs::write(dir.path().join("disk"), "disk").expect("writable");
        cache.check(&image).expect("whole again");
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        for bad in ["../kernel", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "ü"] {
            let mut c = contents();
            c.kernel.file = bad.into();
            let dir = stored(&c.description());
            assert!(
                matches!(Image::open(dir.path()), Err(ImageError::Description { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_link_in_place_of_a_file_is_refused() {
        let dir = stored(&contents().description());
        std::fs::remove_file(dir.path().join("kernel")).expect("removable");
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("kernel")).expect("writable");
        assert!(Image::open(dir.path()).is_err());
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let changes: [fn(&mut Contents); 6] = [
            |c| c.memory = Mib(0),
            |c| c.memory = Mib(u32::MAX),
            |c| c.vcpus = 0,
            |c| c.format = 2,
            |c| c.cmdline = "x".repeat(3000),
            |c| c.cmdline = "a\nb".into(),
        ];
        for change in changes {
            let mut c = contents();
            change(&mut c);
            assert!(Image::open(stored(&c.description()).path()).is_err(), "{c:?}");
        }
        let long = vec![b' '; MAX_DESCRIPTION_BYTES as usize + 1];
        assert!(Image::open(stored(&long).path()).is_err());
    }

    #[test]
    fn changed_contents_no_longer_match_the_hash() {
        let text = String::from_utf8(contents().description()).expect("utf-8");
        let dir = stored(text.replace("quiet", "init=/bin/sh").as_bytes());
        let error = Image::open(dir.path()).expect_err("changed");
        assert!(error.to_string().contains("do not match its hash"), "{error}");
    }

    proptest! {
        #[test]
        fn a_damaged_description_is_never_an_image(at in 0usize..10_000, byte: u8, cut in 0usize..10_000) {
            let sound = contents().description();
            let mut text = sound.clone();
            let at = at % text.len();
            text[at] = byte;
            text.truncate(cut.max(1));
            let dir = stored(&text);
            if let Ok(image) = Image::open(dir.path()) {
                prop_assert_eq!(image.hash, contents().hash());
            }
        }
    }
}
