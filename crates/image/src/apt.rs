//! A private apt: its own lists, status and package cache, the machine's own sources.
//!
//! Nothing here touches the packages installed on the machine. The sources are those entries of
//! `/etc/apt` that name the wanted release; the backports suite is the same entry with the suite
//! name changed, unless the machine has it already.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::process::Command;

use crate::ImageError;
use crate::progress::{Listener, Stage, report};
use crate::tool::{self, APT_GET};

/// The Debian release that images are built from.
pub(crate) const RELEASE: &str = "bookworm";
/// Package lists are fetched again when they are older.
const LISTS_FRESH: Duration = Duration::from_secs(24 * 3600);

/// The private apt of one guest architecture.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
    debs: PathBuf,
    arch: &'static str,
}

impl Apt {
    /// Sets the directories below `cache` up and writes the source list.
    pub(crate) fn open(cache: &Path, arch: &'static str) -> Result<Self, ImageError> {
        let dir = cache.join("apt").join(arch);
        let debs = cache.join("debs");
        for part in ["lists/partial", "archives/partial", "sources", "empty"] {
            let path = dir.join(part);
            std::fs::create_dir_all(&path).map_err(ImageError::io("creating", &path))?;
        }
        std::fs::create_dir_all(&debs).map_err(ImageError::io("creating", &debs))?;
        let apt = Self { dir, debs, arch };
        let status = apt.dir.join("status");
        std::fs::write(&status, "").map_err(ImageError::io("writing", &status))?;
        let sources = sources(Path::new("/etc/apt"))?;
        let path = apt.sources_file();
        if std::fs::read_to_string(&path).ok().as_deref() != Some(sources.as_str()) {
            std::fs::write(&path, sources).map_err(ImageError::io("writing", &path))?;
            // Lists of other sources are of no use.
            let _ = std::fs::remove_file(apt.stamp());
        }
        Ok(apt)
    }

    /// The sources in use, in deb822 form.
    pub(crate) fn sources_file(&self) -> PathBuf {
        self.dir.join("sources/debian.sources")
    }

    fn stamp(&self) -> PathBuf {
        self.dir.join("updated")
    }

    fn command(&self) -> Command {
        let mut command = APT_GET.command();
        let dir = self.dir.display();
        for option in [
            format!("Dir::State={dir}"),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::State::status={dir}/status"),
            format!("Dir::Cache={dir}"),
            format!("Dir::Cache::archives={dir}/archives"),
            format!("Dir::Etc::sourcelist={dir}/empty/none"),
            format!("Dir::Etc::sourceparts={dir}/sources"),
            format!("Dir::Etc::preferences={dir}/empty/none"),
            format!("Dir::Etc::preferencesparts={dir}/empty"),
            format!("APT::Architecture={}", self.arch),
            format!("APT::Architectures={}", self.arch),
            "APT::Sandbox::User=root".into(),
            "APT::Install-Recommends=false".into(),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            "Acquire::Retries=3".into(),
        ] {
            command.arg("-o").arg(option);
        }
        // What the machine does after its own updates is not for a private apt.
        for hook in
            ["APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success", "DPkg::Post-Invoke"]
        {
            command.arg("-o").arg(format!("#clear {hook}="));
        }
        command
    }

    /// Prefers `suite`. The release itself is what apt takes anyway, and naming it would put its
    /// packages before their security updates.
    fn prefer_suite(command: &mut Command, suite: &str) {
        if suite != RELEASE {
            command.args(["-t", suite]);
        }
    }

    /// Fetches the package lists unless they are fresh.
    pub(crate) async fn update(&self, to: Listener<'_>) -> Result<(), ImageError> {
        let fresh = std::fs::metadata(self.stamp())
            .and_then(|m| m.modified())
            .is_ok_and(|t| SystemTime::now().duration_since(t).is_ok_and(|age| age < LISTS_FRESH));
        if fresh {
            return Ok(());
        }
        report(to, Stage::Resolving, None, "fetching package lists");
        let mut command = self.command();
        command.arg("update");
        tool::run(APT_GET, &mut command, "fetching package lists", |_| {}).await?;
        std::fs::write(self.stamp(), "").map_err(ImageError::io("writing", self.stamp()))
    }

    /// File names of all packages that installing `packages` needs, from an empty machine.
    pub(crate) async fn closure(
        &self,
        suite: &str,
        packages: &[String],
    ) -> Result<Vec<String>, ImageError> {
        let mut command = self.command();
        Self::prefer_suite(&mut command, suite);
        command.args(["-y", "--print-uris", "install", "--"]).args(packages);
        self.uris(suite, &mut command)
            .await
            .map(|lines| lines.into_iter().map(|l| l.file).collect())
    }

    /// The package with the kernel itself that the package `kernel` stands for.
    pub(crate) async fn kernel(&self, suite: &str, kernel: &str) -> Result<String, ImageError> {
        let files = self.closure(suite, &[kernel.to_owned()]).await?;
        files
            .iter()
            .find_map(|f| {
                let name = f.split('_').next()?;
                name.strip_prefix("linux-image-")?
                    .starts_with(|c: char| c.is_ascii_digit())
                    .then(|| name.to_owned())
            })
            .ok_or_else(|| ImageError::PackageNotFound {
                package: kernel.into(),
                arch: self.arch.into(),
                suite: suite.into(),
            })
    }

    /// Fetches `packages` themselves, without what they depend on, into the shared package cache.
    /// Those already there are checked against the lists' hashes and kept.
    pub(crate) async fn download(
        &self,
        suite: &str,
        packages: &[String],
        to: Listener<'_>,
    ) -> Result<Vec<PathBuf>, ImageError> {
        let mut command = self.command();
        Self::prefer_suite(&mut command, suite);
        command.args(["--print-uris", "download", "--"]).args(packages);
        let wanted = self.uris(suite, &mut command).await?;
        let total: u64 = wanted.iter().map(|l| l.bytes).sum();
        let mut command = self.command();
        Self::prefer_suite(&mut command, suite);
        command.args(["download", "--"]).args(packages).current_dir(&self.debs);
        let (mut got, mut files) = (0, 0);
        tool::run(APT_GET, &mut command, "fetching packages", |line| {
            // Get:4 URI SUITE PACKAGE ARCH VERSION [SIZE]
            if let Some(package) = line.strip_prefix("Get:").and_then(|l| l.split(' ').nth(4)) {
                files += 1;
                got += wanted
                    .iter()
                    .find(|l| l.file.split('_').next() == Some(package))
                    .map_or(0, |l| l.bytes);
                report(to, Stage::Downloading, Some(got as f32 / total.max(1) as f32), package);
            }
        })
        .await?;
        tracing::debug!(files, bytes = got, "fetched packages");
        Ok(wanted.into_iter().map(|l| self.debs.join(l.file)).collect())
    }

    async fn uris(&self, suite: &str, command: &mut Command) -> Result<Vec<UriLine>, ImageError> {
        match tool::output(APT_GET, command, "finding packages").await {
            Ok(output) => Ok(String::from_utf8_lossy(&output.stdout)
                .lines()
                .filter_map(UriLine::parse)
                .collect()),
            Err(ImageError::ToolFailed { stderr, .. }) if missing_package(&stderr).is_some() => {
                Err(ImageError::PackageNotFound {
                    package: missing_package(&stderr).unwrap_or_default(),
                    arch: self.arch.into(),
                    suite: suite.into(),
                })
            }
            Err(e) => Err(e),
        }
    }
}

/// One line of `--print-uris`: `'URI' FILE BYTES HASH`.
#[derive(Debug, PartialEq)]
struct UriLine {
    file: String,
    bytes: u64,
}

impl UriLine {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix('\'')?.split_once("' ")?.1.split(' ');
        let file = words.next()?;
        if file.contains('/') || !file.ends_with(".deb") {
            return None;
        }
        Some(Self { file: file.into(), bytes: words.next()?.parse().ok()? })
    }
}

fn missing_package(stderr: &str) -> Option<String> {
    let rest = stderr
        .split_once("Unable to locate package ")
        .map(|(_, r)| r)
        .or_else(|| stderr.split_once("Package '").map(|(_, r)| r))
        .or_else(|| {
            stderr.split_once("Can't select candidate version from package ").map(|(_, r)| r)
        })?;
    Some(rest.split([' ', '\'', '|']).next()?.to_owned())
}

/// The entries of `etc` (normally `/etc/apt`) for [`RELEASE`], and its backports.
fn sources(etc: &Path) -> Result<String, ImageError> {
    let mut files = vec![etc.join("sources.list")];
    let parts = etc.join("sources.list.d");
    if let Ok(entries) = std::fs::read_dir(&parts) {
        let mut more: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        more.sort();
        files.append(&mut more);
    }
    let mut entries = Vec::new();
    for path in files {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        match path.extension().and_then(|e| e.to_str()) {
            Some("sources") => entries.extend(text.split("\n\n").filter_map(Entry::from_deb822)),
            Some("list") => entries.extend(text.lines().filter_map(Entry::from_line)),
            _ => {}
        }
    }
    let backports = format!("{RELEASE}-backports");
    let of_release = |e: &Entry| e.suites.iter().any(|s| s.starts_with(RELEASE));
    entries.retain(of_release);
    if !entries.iter().any(|e| e.suites.contains(&backports)) {
        let main = entries.iter().find(|e| e.suites.iter().any(|s| s == RELEASE)).cloned();
        entries.extend(main.map(|e| Entry { suites: vec![backports.clone()], ..e }));
    }
    if !entries.iter().any(|e| e.suites.iter().any(|s| s == RELEASE)) {
        return Err(ImageError::NoAptSource { suite: RELEASE.into() });
    }
    Ok(entries.iter().map(Entry::to_deb822).collect::<Vec<_>>().join("\n"))
}

/// One source. Only `main` is used, for every architecture.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    uris: String,
    suites: Vec<String>,
    signed_by: Option<String>,
}

impl Entry {
    fn from_deb822(stanza: &str) -> Option<Self> {
        let field = |name: &str| {
            stanza.lines().find_map(|l| {
                let (key, value) = l.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        let on = field("Enabled").is_none_or(|v| v != "no");
        let binary = field("Types")?.split_whitespace().any(|t| t == "deb");
        let main = field("Components")?.split_whitespace().any(|c| c == "main");
        (on && binary && main).then_some(())?;
        Some(Self {
            uris: field("URIs")?,
            suites: field("Suites")?.split_whitespace().map(str::to_owned).collect(),
            signed_by: field("Signed-By").filter(|s| s.starts_with('/')),
        })
    }

    fn from_line(line: &str) -> Option<Self> {
        let mut rest = line.trim().strip_prefix("deb ")?.trim_start();
        let mut signed_by = None;
        if let Some(options) = rest.strip_prefix('[') {
            let (options, after) = options.split_once(']')?;
            signed_by = options
                .split_whitespace()
                .find_map(|o| o.strip_prefix("signed-by="))
                .map(str::to_owned);
            rest = after;
        }
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        words.any(|c| c == "main").then(|| Self {
            uris: uri.into(),
            suites: vec![suite.into()],
            signed_by,
        })
    }

    fn to_deb822(&self) -> String {
        let signed = self.signed_by.as_ref().map_or(String::new(), |s| format!("Signed-By: {s}\n"));
        format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n{signed}",
            self.uris,
            self.suites.join(" ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etc(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir(dir.path().join("sources.list.d")).expect("writable");
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).expect("writable");
        }
        dir
    }

    #[test]
    fn backports_are_the_installed_entry_with_another_suite() {
        let dir = etc(&[(
            "sources.list.d/debian.sources",
            "Types: deb\n# note\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://other.example/x\nSuites: stable\nComponents: main\n",
        )]);
        assert_eq!(
            sources(dir.path()).expect("there is one"),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\nSigned-By: /k.gpg\n"
        );
    }

    #[test]
    fn one_line_entries_count_too() {
        let dir = etc(&[(
            "sources.list",
            "# deb http://no.example bookworm main\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\ndeb http://mirror.example/debian bookworm-backports main\n",
        )]);
        let text = sources(dir.path()).expect("there is one");
        assert_eq!(text.matches("Suites: bookworm-backports").count(), 1);
        assert!(text.contains("Signed-By: /k.gpg") && !text.contains("no.example"));
    }

    #[test]
    fn a_machine_without_the_release_is_refused_in_words() {
        let dir = etc(&[("sources.list", "deb http://mirror.example/ubuntu noble main\n")]);
        assert!(matches!(sources(dir.path()), Err(ImageError::NoAptSource { .. })));
    }

    #[test]
    fn apt_lines_are_understood() {
        let line = "'http://m.example/pool/z/zlib1g_1.2_amd64.deb' zlib1g_1%3a1.2_amd64.deb 86684 SHA256:00";
        assert_eq!(
            UriLine::parse(line),
            Some(UriLine { file: "zlib1g_1%3a1.2_amd64.deb".into(), bytes: 86684 })
        );
        assert_eq!(UriLine::parse("Reading package lists..."), None);
        assert_eq!(UriLine::parse("'http://m.example/x' ../x.deb 1 SHA256:00"), None);
        assert_eq!(
            missing_package("E: Unable to locate package nonesuch").as_deref(),
            Some("nonesuch")
        );
    }
}
