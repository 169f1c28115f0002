//! No QEMU outlives the test that started it, however the test ends.

use std::path::{Path, PathBuf};

/// On its drop every QEMU ends whose command line names a file in the directory.
pub(crate) struct EndsGuests(PathBuf);

impl EndsGuests {
    pub(crate) fn of(dir: &Path) -> Self {
        Self(dir.to_owned())
    }
}

impl Drop for EndsGuests {
    fn drop(&mut self) {
        let inside = format!("{}/", self.0.display());
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = process.file_name().to_str().and_then(|n| n.parse().ok());
            let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { continue };
            let words = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            let program = words.split('\0').next().unwrap_or_default();
            if program.contains("qemu-system-") && words.contains(&inside) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}
