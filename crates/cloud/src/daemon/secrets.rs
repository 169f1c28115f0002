//! What a client needs to reach the API: its address, the certificate, the operator token.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use godwit_types::{Code, Fault};

use crate::token::{USER_TOKEN, check_of, checked};

/// The files of a client, in `~/.config/godwit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFiles {
    /// The directory.
    pub dir: PathBuf,
}

impl ClientFiles {
    /// The usual directory: `$XDG_CONFIG_HOME/godwit` or `~/.config/godwit`.
    #[must_use]
    pub fn usual() -> Self {
        let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).unwrap_or_else(|| {
            std::env::var_os("HOME")
                .map_or_else(|| PathBuf::from("/root"), PathBuf::from)
                .join(".config")
        });
        Self { dir: base.join("godwit") }
    }

    /// The operator token.
    #[must_use]
    pub fn token(&self) -> PathBuf {
        self.dir.join("token")
    }

    /// The API's certificate, PEM.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// The API's address.
    #[must_use]
    pub fn api(&self) -> PathBuf {
        self.dir.join("api")
    }

    /// Writes them, readable by the owner only.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn write(&self, api: &str, ca_pem: &str, token: &str) -> Result<(), Fault> {
        make_dir(&self.dir)?;
        write_private(&self.token(), token.as_bytes())?;
        write_private(&self.ca(), ca_pem.as_bytes())?;
        write_private(&self.api(), api.as_bytes())
    }
}

fn fail(doing: &str, path: &Path, e: &std::io::Error) -> Fault {
    let code =
        if e.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Internal };
    Fault::new(code, format!("{doing} {}: {e}", path.display()))
}

pub(super) fn make_dir(dir: &Path) -> Result<(), Fault> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| fail("making", dir, &e))
}

/// Writes a secret under mode 0600, whole or not at all.
pub(super) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    write_as(path, bytes, 0o600)
}

/// Writes what everybody may read, such as a certificate, under mode 0644, whole or not at all.
pub(super) fn write_public(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    write_as(path, bytes, 0o644)
}

fn write_as(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Fault> {
    let temp = path.with_extension("new");
    // A leftover of a crash may have another mode.
    let _ = std::fs::remove_file(&temp);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temp)
        .map_err(|e| fail("making", &temp, &e))?;
    // Whatever the daemon's own mask takes away.
    file.set_permissions(std::fs::Permissions::from_mode(mode))
        .map_err(|e| fail("making", &temp, &e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| fail("writing", &temp, &e))?;
    std::fs::rename(&temp, path).map_err(|e| fail("making", path, &e))
}

/// What begins a token that was drawn by a center of this version: `gwt-`, 64 hex digits, `-`, and
/// the first 8 hex digits of the BLAKE3 hash of what is before that. Older ones have no check, nor
/// have those that an operator has chosen.
const DRAWN: &str = "gwt-";
const DRAWN_LEN: usize = 4 + 64 + 1 + 8;

/// The tokens that have a check: what begins them, and their length.
const WITH_CHECK: [(&str, usize); 2] = [(DRAWN, DRAWN_LEN), (USER_TOKEN, 4 + 16 + 1 + 64 + 1 + 8)];

fn draw() -> String {
    checked(&format!("{DRAWN}{}", hex::encode(rand::random::<[u8; 32]>())))
}

/// Whether a token is whole, as far as it can tell. A changed byte can make its length one less at
/// either end, where white space does not count.
fn is_whole(token: &str) -> bool {
    let like = |(begin, len): &(&str, usize)| {
        token.starts_with(begin) || (len - 1..=*len).contains(&token.len())
    };
    let Some((begin, len)) = WITH_CHECK.into_iter().find(like) else { return true };
    let drawn = token.starts_with(begin) && token.len() == len;
    drawn
        && token
            .rsplit_once('-')
            .is_some_and(|(text, check)| text.len() == len - 9 && check == check_of(text))
}

/// Reads an operator token; a file that others may read is refused.
///
/// # Errors
/// When it is not there, readable by others, damaged, or no token.
pub fn read_token(path: &Path) -> Result<String, Fault> {
    let meta = std::fs::metadata(path).map_err(|e| fail("reading", path, &e))?;
    if !meta.is_file() {
        let what = if meta.is_dir() { "a directory" } else { "no regular file" };
        return Err(Fault::new(
            Code::Unauthenticated,
            format!("the token file {} is {what}", path.display()),
        ));
    }
    if meta.permissions().mode() & 0o077 != 0 {
        return Err(Fault::new(
            Code::Unauthenticated,
            format!("the token file {} may be read by others", path.display()),
        )
        .hint(format!("chmod 600 {}", path.display())));
    }
    let damaged = |why: &str| {
        let words = format!("the token file {} is damaged: {why}", path.display());
        Err(Fault::new(Code::Damaged, words).hint(
            "copy it again from the center's keys/operator-token; if that one is damaged, remove it \
             and start the center again, which draws a new one",
        ))
    };
    if meta.len() > 4096 {
        return damaged("it is too long for a token");
    }
    let bytes = std::fs::read(path).map_err(|e| fail("reading", path, &e))?;
    let Ok(text) = String::from_utf8(bytes) else { return damaged("it is no text") };
    let token = text.trim();
    if token.len() < 16 || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return damaged("it holds no token");
    }
    if !is_whole(token) {
        return damaged("its check does not fit");
    }
    Ok(token.to_owned())
}

/// The token in `path`, drawn anew when there is none.
pub(super) fn token_or_new(path: &Path) -> Result<String, Fault> {
    match read_token(path) {
        Err(f) if f.code == Code::NotFound => {
            let token = draw();
            write_private(path, token.as_bytes())?;
            Ok(token)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_everybody_may_read_is_written_so_and_a_secret_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode();
        let path = dir.path().join("ca.pem");
        write_private(&path, b"secret").expect("written");
        assert_eq!(mode(&path) & 0o777, 0o600);
        write_public(&path, b"certificate").expect("written");
        assert_eq!(mode(&path) & 0o777, 0o644);
        assert_eq!(std::fs::read(&path).expect("read"), b"certificate");
    }

    #[test]
    fn a_token_is_drawn_once_kept_private_and_refused_when_it_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let f = read_token(dir.path()).expect_err("a directory");
        assert!(f.message.ends_with("is a directory") && f.hint.is_none(), "{f}");
        let path = dir.path().join("token");
        let first = token_or_new(&path).expect("drawn");
        assert_eq!(first.len(), DRAWN_LEN);
        assert_eq!(token_or_new(&path).expect("kept"), first);
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        let f = read_token(&path).expect_err("open to others");
        assert!(f.hint.expect("advice").starts_with("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        std::fs::write(&path, "short").expect("write");
        assert_eq!(read_token(&path).expect_err("no token").code, Code::Damaged);
    }

    #[test]
    fn one_flipped_bit_of_a_token_is_damage_and_not_a_wrong_token() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("token");
        let token = token_or_new(&path).expect("drawn");
        for at in 0..token.len() {
            for bit in 0..8 {
                let mut bytes = token.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                std::fs::write(&path, &bytes).expect("write");
                let f = read_token(&path).expect_err("damaged");
                let words = (f.code, f.message.contains("is damaged"), f.hint.is_some());
                assert_eq!(words, (Code::Damaged, true, true), "{at}, {bit}: {f}");
                assert_eq!(token_or_new(&path).expect_err("kept").code, Code::Damaged);
            }
        }
        // Of an older center, or the operator's own.
        for good in ["0123456789abcdef", &"a".repeat(64), &"b".repeat(200)] {
            std::fs::write(&path, format!("{good}\n")).expect("write");
            assert_eq!(read_token(&path).expect("taken"), *good);
        }
    }
}
