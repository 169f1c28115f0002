//! Control groups.

/// The path of a thread in the hierarchy that shares out CPU time, from the text of
/// `/proc/<tid>/cgroup`: the `cpu` controller of version 1 where there is one, else version 2.
#[must_use]
pub fn cpu_path(text: &str) -> Option<&str> {
    let mut unified = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if controllers.split(',').any(|c| c == "cpu") {
            return Some(path);
        }
        if controllers.is_empty() {
            unified = Some(path);
        }
    }
    unified
}
