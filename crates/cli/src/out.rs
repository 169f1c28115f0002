//! Answers on stdout, in the form that was asked for; messages on stderr.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::failure::{Failure, Result};

/// How answers are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people
    #[default]
    Table,
    /// More columns
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// Only the names, one a line
    Name,
}

/// What can be a line of a table.
pub(crate) trait Row: Serialize {
    /// Titles of the columns; those from [`Row::WIDE`] on are shown only when asked for.
    const COLUMNS: &'static [&'static str];
    /// How many columns the narrow table has.
    const WIDE: usize;
    /// One text for each column.
    fn cells(&self) -> Vec<String>;
    /// The name alone.
    fn name(&self) -> String;
}

/// Writes one line to stdout. A reader that went away ends nothing: what it wanted, it has.
pub(crate) fn line(text: &str) -> Result<()> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes bytes to stdout.
pub(crate) fn bytes(data: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(data).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::internal(format!("writing the answer: {e}")))
        }
        _ => Ok(()),
    }
}

/// Writes one line to stderr.
pub(crate) fn notice(text: &str) {
    // Nobody is left to be told when this fails.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes bytes to stderr.
pub(crate) fn talk_bytes(data: &[u8]) {
    // As above.
    let _ = io::stderr().lock().write_all(data);
}

/// Names on stderr the sites that gave no answer.
pub(crate) fn unanswered(sites: &[godwit_cloud::controller::Unanswered]) {
    for site in sites {
        notice(&format!("warning: {}", plain(&site.error.message)));
    }
}

/// Whether bars and spinners may be drawn.
pub(crate) fn shows_progress() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// The name of what belongs to `tenant`, as it can be said from everywhere.
pub(crate) fn of_tenant(tenant: &godwit_types::Name, name: &godwit_types::Name) -> String {
    match tenant.as_str() {
        godwit_cloud::access::DEFAULT_TENANT => name.to_string(),
        tenant => format!("{tenant}/{name}"),
    }
}

/// Prints a list.
pub(crate) fn list<T: Row>(format: Format, rows: &[T]) -> Result<()> {
    match format {
        Format::Table | Format::Wide => bytes(table(format, rows.iter()).as_bytes()),
        Format::Name => rows.iter().try_for_each(|r| line(&r.name())),
        Format::Json | Format::Yaml => value(format, &rows),
    }
}

/// Prints one object; for people as a list of its properties.
pub(crate) fn one<T: Row>(format: Format, row: &T) -> Result<()> {
    match format {
        Format::Table | Format::Wide => bytes(properties(row).as_bytes()),
        Format::Name => line(&row.name()),
        Format::Json | Format::Yaml => value(format, row),
    }
}

/// Prints the answer to an action: `words` for people, `name`, or all of `data`.
pub(crate) fn action(
    format: Format,
    words: &str,
    name: &str,
    data: &serde_json::Value,
) -> Result<()> {
    match format {
        Format::Table | Format::Wide => line(&plain(words)),
        Format::Name => line(name),
        Format::Json | Format::Yaml => value(format, data),
    }
}

/// Prints anything as JSON or YAML.
pub(crate) fn value<T: Serialize + ?Sized>(format: Format, data: &T) -> Result<()> {
    let text = if format == Format::Yaml {
        serde_yaml_ng::to_string(data).map_err(|e| e.to_string())
    } else {
        serde_json::to_string_pretty(data).map(|t| t + "\n").map_err(|e| e.to_string())
    };
    bytes(text.map_err(|e| Failure::internal(format!("writing the answer: {e}")))?.as_bytes())
}

/// A list as a table.
pub(crate) fn table<'a, T: Row + 'a>(format: Format, rows: impl Iterator<Item = &'a T>) -> String {
    let columns = if format == Format::Wide { T::COLUMNS.len() } else { T::WIDE };
    let mut lines: Vec<Vec<String>> =
        vec![T::COLUMNS[..columns].iter().map(ToString::to_string).collect()];
    lines.extend(rows.map(|r| r.cells().iter().take(columns).map(|c| cell(c)).collect()));
    let widths: Vec<usize> = (0..columns)
        .map(|i| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for l in &lines {
        let mut text = String::new();
        for (c, w) in l.iter().zip(&widths) {
            text.push_str(&format!("{c:w$}   "));
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

fn properties<T: Row>(row: &T) -> String {
    let width = T::COLUMNS.iter().map(|c| c.len()).max().unwrap_or(0);
    let mut out = String::new();
    for (c, v) in T::COLUMNS.iter().zip(row.cells()) {
        let whole = if v.is_empty() { "-".into() } else { short(&v, usize::MAX) };
        out.push_str(&format!("{:width$}   {whole}\n", c.to_lowercase()));
    }
    out
}

/// A text as it stands in a table.
pub(crate) fn cell(text: &str) -> String {
    if text.is_empty() { "-".into() } else { short(text, CELL) }
}

/// The longest text in a table, in characters.
const CELL: usize = 120;

/// The longest word that is shown of a foreign text, and what is left of a longer one.
const WORD: (usize, usize) = (240, 60);

/// `text` on one line, cut at a word.
pub(crate) fn short(text: &str, max: usize) -> String {
    let line = plain(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    if line.chars().count() <= max {
        return line;
    }
    let kept: String = line.chars().take(max).collect();
    let kept = kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words);
    format!("{}\u{2026}", kept.trim_end_matches([' ', ',', ';', ':', '|']))
}

/// `text` with its control characters made visible: what a guest, a peer or a user wrote must
/// not steer the terminal, nor turn what it shows around.
pub(crate) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.extend(c.escape_debug()),
            // Marks of direction, and what has no width.
            '\u{61c}'
            | '\u{200b}'
            | '\u{200e}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{2069}'
            | '\u{feff}'
            | '\u{e0000}'..='\u{e007f}' => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// As [`plain`], with words of an absurd length cut: for messages that repeat what was given.
pub(crate) fn tame(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for part in plain(text).split_inclusive(char::is_whitespace) {
        let word = part.trim_end();
        if word.chars().count() <= WORD.0 {
            out.push_str(part);
            continue;
        }
        out.extend(word.chars().take(WORD.1));
        out.push('\u{2026}');
        out.extend(word.chars().last().filter(|c| ['\'', '"'].contains(c)));
        out.push_str(&part[word.len()..]);
    }
    out
}

/// Milliseconds for people: `41 ms`, `0.61 s`, `3.9 s`, `39 s`.
pub(crate) fn millis(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 500.0 => format!("{ms:.0} ms"),
        ms if ms < 995.0 => format!("{:.2} s", ms / 1e3),
        ms if ms < 9_950.0 => format!("{:.1} s", ms / 1e3),
        ms => format!("{:.0} s", ms / 1e3),
    }
}

/// Bytes for people: `812 B`, `6.1 MiB`, `512 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1023.5 || unit == "GiB" {
            let digits = usize::from(unit != "B" && value < 9.95);
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    unreachable!("the last unit returns")
}

/// How long ago, for people: `5s`, `12m`, `3h`, `2d`.
pub(crate) fn age(since: godwit_types::UnixMs) -> String {
    let s = godwit_types::UnixMs::now().since(since).as_secs();
    match s {
        0..120 => format!("{s}s"),
        120..7_200 => format!("{}m", s / 60),
        7_200..172_800 => format!("{}h", s / 3_600),
        _ => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Bird(&'static str, &'static str, u32);
    impl Row for Bird {
        const COLUMNS: &'static [&'static str] = &["NAME", "SAYS", "KM"];
        const WIDE: usize = 2;
        fn cells(&self) -> Vec<String> {
            vec![self.0.into(), self.1.into(), self.2.to_string()]
        }
        fn name(&self) -> String {
            self.0.into()
        }
    }

    #[test]
    fn tables_align_and_trim() {
        let birds = [Bird("godwit", "", 12_000), Bird("owl", "hoo\x07", 3)];
        assert_eq!(
            table(Format::Table, birds.iter()),
            "NAME     SAYS\ngodwit   -\nowl      hoo\\u{7}\n"
        );
        assert_eq!(
            table(Format::Wide, birds[..1].iter()),
            "NAME     SAYS   KM\ngodwit   -      12000\n"
        );
        assert_eq!(properties(&birds[0]), "name   godwit\nsays   -\nkm     12000\n");
        assert_eq!(table(Format::Table, [].iter() as std::slice::Iter<'_, Bird>), "NAME   SAYS\n");
    }

    #[test]
    fn a_reason_is_one_line_and_is_cut_at_a_word() {
        let log = "QEMU ended: ram_block_discard_range: failed\nqemu: second line, of many words";
        assert_eq!(short(log, 200), log.replace('\n', " "));
        assert_eq!(
            short(log, 62),
            "QEMU ended: ram_block_discard_range: failed qemu: second\u{2026}"
        );
        assert_eq!(cell(&"x ".repeat(500)).chars().count(), CELL);
    }

    #[test]
    fn what_is_repeated_neither_steers_the_terminal_nor_fills_it() {
        assert_eq!(plain("a\u{202e}b\u{2066}\x1b"), "a\\u{202e}b\\u{2066}\\u{1b}");
        let long = tame(&format!("invalid value '{}' for", "n".repeat(5000)));
        assert_eq!(long, format!("invalid value '{}\u{2026}' for", "n".repeat(59)));
        assert_eq!(tame("two  words\n"), "two  words\n");
    }

    #[test]
    fn figures_have_two_or_three_digits() {
        let ms = [0.31, 41.4, 610.0, 3_900.0, 39_000.0].map(millis);
        assert_eq!(ms, ["0.3 ms", "41 ms", "0.61 s", "3.9 s", "39 s"]);
        let sizes = [812, 6_396_314, 512 << 20, 3 << 30].map(size);
        assert_eq!(sizes, ["812 B", "6.1 MiB", "512 MiB", "3.0 GiB"]);
    }
}
