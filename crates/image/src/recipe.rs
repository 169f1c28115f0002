//! Recipes: what an image is made of.

use godwit_types::{Arch, Hash, Mib, Name};
use serde::Deserialize;

use crate::{ImageError, guests};

/// Grows when the same recipe would give another image.
const BUILDER_VERSION: u32 = 1;

/// How an image is put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Everything runs from the initial RAM disk; the disk only holds data, at `/data`.
    Initramfs,
    /// A Debian root file system on the disk.
    Debian,
}

/// One recipe, as written in `guests/<name>/recipe.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the recipe and of the image.
    pub name: Name,
    /// One line for people.
    pub summary: String,
    /// Guest architecture.
    pub arch: Arch,
    /// How it is put together.
    pub kind: Kind,
    /// Memory that the guest is made for.
    #[serde(rename = "memory_mib")]
    pub memory: Mib,
    /// vCPUs that the guest is made for.
    pub vcpus: u8,
    /// Whether the guest shows something on a display.
    pub display: bool,
    /// The program on the display.
    #[serde(default)]
    pub app: Option<String>,
    /// Size of the disk.
    #[serde(rename = "disk_mib")]
    pub disk: Mib,
    /// Debian's kernel package; one that depends on the newest version.
    pub kernel: String,
    /// The suite that the kernel comes from.
    pub kernel_suite: String,
    /// Folders of `guests/` whose files are put into the guest, in this order, before those of
    /// `<name>/overlay`. A file `packages` on top lists further packages, a script `customize`
    /// runs on the finished root file system.
    #[serde(default)]
    pub overlays: Vec<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// Kernel modules in the initial RAM disk. What they depend on comes with them.
    pub modules: Vec<String>,
    /// Debian packages.
    pub packages: Vec<String>,
    /// `initramfs`: files taken from the packages, with the libraries that they need.
    #[serde(default)]
    pub files: Vec<String>,
    /// `debian`: the folder with the initial RAM disk's own files.
    #[serde(default)]
    pub initramfs: Option<String>,
}

impl Recipe {
    /// The recipe called `name`.
    ///
    /// # Errors
    /// [`ImageError::NoRecipe`] when there is none, [`ImageError::Recipe`] when it is not sound.
    pub fn get(name: &Name) -> Result<Self, ImageError> {
        let text =
            guests::file(&format!("{name}/recipe.toml")).ok_or_else(|| ImageError::NoRecipe {
                name: name.clone(),
                known: Self::names().iter().map(Name::as_str).collect::<Vec<_>>().join(", "),
            })?;
        let bad = |why: String| ImageError::Recipe { name: name.to_string(), why };
        let text = std::str::from_utf8(text).map_err(|e| bad(e.to_string()))?;
        let recipe: Self = toml::from_str(text).map_err(|e| bad(e.to_string()))?;
        if recipe.name != *name {
            return Err(bad(format!("it calls itself '{}'", recipe.name)));
        }
        Ok(recipe)
    }

    /// Names of all images that can be built.
    #[must_use]
    pub fn names() -> Vec<Name> {
        guests::FILES
            .iter()
            .filter_map(|(path, _)| Name::new(path.strip_suffix("/recipe.toml")?).ok())
            .collect()
    }

    /// Hash of the recipe and of every embedded file that goes into the image.
    #[must_use]
    pub fn hash(&self) -> Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&BUILDER_VERSION.to_le_bytes());
        let own = self.name.as_str();
        let ramdisk = self.initramfs.as_deref();
        let folders =
            self.overlays.iter().map(String::as_str).chain(ramdisk).chain([own, "witness"]);
        for folder in folders {
            for (path, content) in guests::below(folder) {
                hasher.update(&(path.len() as u64).to_le_bytes()).update(path.as_bytes());
                hasher.update(&(content.len() as u64).to_le_bytes()).update(content);
            }
        }
        Hash(*hasher.finalize().as_bytes())
    }

    /// Packages of the overlay folders and of the recipe itself.
    pub(crate) fn all_packages(&self) -> Vec<String> {
        let listed = self.overlays.iter().filter_map(|o| guests::file(&format!("{o}/packages")));
        let listed = listed.filter_map(|text| std::str::from_utf8(text).ok()).flat_map(str::lines);
        listed.map(str::to_owned).chain(self.packages.iter().cloned()).collect()
    }

    /// Debian's name of the architecture.
    pub(crate) fn debian_arch(&self) -> &'static str {
        debian_arch(self.arch)
    }
}

/// Debian's name of an architecture.
pub(crate) fn debian_arch(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "amd64",
        Arch::Aarch64 => "arm64",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_sound() {
        let names = Recipe::names();
        assert!(names.len() >= 2);
        for name in names {
            let recipe = Recipe::get(&name).expect("a sound recipe");
            for overlay in &recipe.overlays {
                assert!(guests::below(overlay).next().is_some(), "{name}: no folder {overlay}");
            }
            assert!(recipe.cmdline.contains("page_reporting.page_reporting_order=0"), "{name}");
        }
    }

    #[test]
    fn a_name_without_a_recipe_lists_those_that_exist() {
        let e = Recipe::get(&Name::new("windows").expect("valid")).expect_err("no such recipe");
        assert!(e.to_string().contains("tiny"), "{e}");
    }

    #[test]
    fn the_hash_differs_between_recipes() {
        let hash = |n: &str| Recipe::get(&Name::new(n).expect("valid")).expect("there").hash();
        assert_eq!(hash("tiny"), hash("tiny"));
        assert_ne!(hash("tiny"), hash("tiny-arm64"));
    }
}
