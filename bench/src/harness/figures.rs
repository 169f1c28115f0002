//! The figures of SPECIFICATION.md: what is promised, what was measured, whether it was met, and what
//! shows it; kept as JSON and written out as tables.
//!
//! ```text
//! figures.json  --take--> results.json, report.json of runs  -->  figures.json, tables
//! ```
//!
//! A figure says where it comes from, so that a run fills it in and nobody copies numbers by hand.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::report::figure;
use super::stats::summary;

/// Version of the file.
pub const SCHEMA: u32 = 1;

/// The longest cell of a table, in characters: no more than a line of the page.
pub const LINE: usize = 80;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// [`SCHEMA`].
    pub schema: u32,
    /// All figures, in the order of the page; those of one section follow each other.
    pub figures: Vec<Figure>,
}

/// One promise with its figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// Section of the page.
    pub section: String,
    /// What is promised, in words; the bound is said by `limit`.
    pub goal: String,
    /// The bound; none where a figure is only told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
    /// Unit of bound and values.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unit: String,
    /// Test or command that shows it.
    pub shown_by: String,
    /// Where a run has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// What was measured, all values; empty: pending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<f64>,
    /// What it was measured on: guest, accelerator, link.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub on: String,
    /// Commit and time of the run.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub run: String,
    /// Whether the median keeps the bound; filled in with the values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub met: Option<bool>,
}

/// A bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// Where a figure is found in a run's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The suite, e.g. `mainjob` or `demo`.
    pub suite: String,
    /// The guest image; any where none is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// Where in it.
    pub at: At,
}

/// A place in a run's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum At {
    /// All values of a subject in an experiment: `[experiment, subject]`.
    Series(String, String),
    /// Single values, by JSON pointers.
    Values(Vec<String>),
}

impl Limit {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

impl Source {
    fn matches(&self, run: &Value) -> bool {
        run["suite"] == *self.suite && self.guest.as_ref().is_none_or(|g| run["guest"] == **g)
    }

    fn values(&self, run: &Value) -> Vec<f64> {
        match &self.at {
            At::Values(pointers) => {
                pointers.iter().filter_map(|p| run.pointer(p)?.as_f64()).collect()
            }
            At::Series(experiment, subject) => {
                let all = |v: &Value, key: &str, name: &str| -> Option<Value> {
                    v.as_array()?.iter().find(|e| e[key] == *name).cloned()
                };
                all(&run["experiments"], "name", experiment)
                    .and_then(|e| all(&e["series"], "subject", subject))
                    .and_then(|s| serde_json::from_value(s["values"].clone()).ok())
                    .unwrap_or_default()
            }
        }
    }
}

/// What a run took place on, in a few words.
fn ground(run: &Value) -> String {
    let mut parts = Vec::new();
    for key in ["guest", "accel"] {
        parts.extend(run[key].as_str().map(str::to_owned));
    }
    let link = &run["link"];
    if let (Some(rate), Some(rtt)) = (link["rate_mbit"].as_f64(), link["rtt_ms"].as_f64()) {
        parts.push(format!("{rate} Mbit/s, {rtt} ms (emulated)"));
    }
    parts.join(", ")
}

impl Figures {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, or has another form.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let me: Self =
            serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
        ensure!(me.schema == SCHEMA, "{} has the form {}", path.display(), me.schema);
        Ok(me)
    }

    /// Takes every figure that `run` (a `results.json`, or the demo's `report.json`) has; gives how
    /// many those were.
    pub fn take(&mut self, run: &Value) -> usize {
        let mut taken = 0;
        for f in &mut self.figures {
            let Some(source) = f.source.as_ref().filter(|s| s.matches(run)) else { continue };
            let values = source.values(run);
            let Some(summary) = summary(&values) else { continue };
            f.met = f.limit.map(|l| l.met(summary.median));
            f.values = values;
            f.on = ground(run);
            let words = [&run["git_rev"], &run["started"]].map(|v| v.as_str().unwrap_or_default());
            f.run = words.join(" ").trim().to_owned();
            taken += 1;
        }
        taken
    }

    /// The file's text.
    ///
    /// # Errors
    /// For a value that JSON does not have.
    pub fn json(&self) -> anyhow::Result<String> {
        let mut text = serde_json::to_string_pretty(self).context("write the figures as JSON")?;
        text.push('\n');
        Ok(text)
    }

    /// One table a section: goal, figure, met or missed, shown by, on.
    ///
    /// # Errors
    /// When a cell would be longer than [`LINE`]; says which.
    pub fn markdown(&self) -> anyhow::Result<String> {
        let mut t = String::new();
        let mut section = None;
        for f in &self.figures {
            if section != Some(&f.section) {
                let gap = if section.is_some() { "\n" } else { "" };
                let _ = writeln!(t, "{gap}### {}\n", f.section);
                let _ = writeln!(t, "| goal | figure | | shown by | on |\n|---|---|---|---|---|");
                section = Some(&f.section);
            }
            let cells = f.cells();
            for cell in &cells {
                ensure!(
                    cell.chars().count() <= LINE,
                    "a cell of '{}' is longer than {LINE} characters: {cell}",
                    f.goal
                );
            }
            let _ = writeln!(t, "| {} |", cells.map(|c| c.replace('|', "\\|")).join(" | "));
        }
        Ok(t)
    }
}

impl Figure {
    fn cells(&self) -> [String; 5] {
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        let goal = match self.limit {
            None => self.goal.clone(),
            Some(Limit::AtMost(v)) => format!("{}: at most {}{unit}", self.goal, plain(v)),
            Some(Limit::AtLeast(v)) => format!("{}: at least {}{unit}", self.goal, plain(v)),
        };
        let measured = match summary(&self.values) {
            None => "pending".to_owned(),
            Some(s) if s.n == 1 => format!("{}{unit}", plain(s.median)),
            Some(s) => format!(
                "{}{unit} ({} to {}, n = {})",
                plain(s.median),
                plain(s.min),
                plain(s.max),
                s.n
            ),
        };
        let met = match self.met {
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "",
        };
        [goal, measured, met.into(), self.shown_by.clone(), self.on.clone()]
    }
}

/// A number without digits that say nothing.
fn plain(v: f64) -> String {
    if v.fract() == 0.0 && v.abs() < 1e9 { format!("{v:.0}") } else { figure(v) }
}

/// `page` with `tables` where its marks are; `None` where it has none.
#[must_use]
pub fn within(page: &str, tables: &str) -> Option<String> {
    const BEGIN: &str = "<!-- figures: written by `godwit-bench spec` -->\n";
    const END: &str = "<!-- end of figures -->";
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{tables}\n{END}{after}"))
}

/// Every file of a run below `dir`: `results.json` and `report.json`.
///
/// # Errors
/// When a folder or a file cannot be read.
pub fn runs_below(dir: &Path) -> anyhow::Result<Vec<(PathBuf, Value)>> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("read {}", folder.display()))? {
            let path = entry.with_context(|| format!("read {}", folder.display()))?.path();
            let name = path.file_name().unwrap_or_default();
            if path.is_dir() {
                folders.push(path);
            } else if name == "results.json" || name == "report.json" {
                let text = std::fs::read(&path);
                let text = text.with_context(|| format!("read {}", path.display()))?;
                let run = serde_json::from_slice(&text);
                found
                    .push((path.clone(), run.with_context(|| format!("read {}", path.display()))?));
            }
        }
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn one(limit: Option<Limit>, at: At) -> Figure {
        Figure {
            section: "Moving".into(),
            goal: "down".into(),
            limit,
            unit: "ms".into(),
            shown_by: "`make demo`".into(),
            source: Some(Source { suite: "mainjob".into(), guest: Some("tiny".into()), at }),
            values: Vec::new(),
            on: String::new(),
            run: String::new(),
            met: None,
        }
    }

    fn series() -> At {
        At::Series("downtime".into(), "godwit".into())
    }

    fn run(guest: &str) -> Value {
        json!({ "suite": "mainjob", "guest": guest, "accel": "tcg", "git_rev": "abc",
            "started": "2026-11-29T00:00:00Z", "link": { "rate_mbit": 100.0, "rtt_ms": 35.0 },
            "experiments": [{ "name": "downtime", "series": [
                { "subject": "stock", "values": [500.0] },
                { "subject": "godwit", "values": [80.0, 41.25, 90.0] }] }],
            "reports": { "moves": [{ "hung": 0 }] } })
    }

    #[test]
    fn a_run_fills_figures_in_and_says_which_were_missed() {
        let at_most = |v| Some(Limit::AtMost(v));
        let pointer = At::Values(vec!["/reports/moves/0/hung".into(), "/nothing".into()]);
        let mut all = Figures {
            schema: SCHEMA,
            figures: vec![
                one(at_most(150.0), series()),
                one(at_most(50.0), series()),
                one(Some(Limit::AtLeast(1.0)), pointer),
                one(None, At::Series("nothing".into(), "godwit".into())),
            ],
        };
        assert_eq!(all.take(&run("abiword")), 0, "another guest");
        assert_eq!(all.take(&run("tiny")), 3);
        let met: Vec<_> = all.figures.iter().map(|f| f.met).collect();
        assert_eq!(met, [Some(true), Some(false), Some(false), None]);
        let page = all.markdown().expect("written");
        let row = "| down: at most 150 ms | 80 ms (41.2 to 90, n = 3) | met | `make demo` | \
            tiny, tcg, 100 Mbit/s, 35 ms (emulated) |";
        assert!(page.contains(row), "{page}");
        assert!(page.contains("**missed**") && page.contains("| down | pending |"), "{page}");
        assert_eq!(page.matches("### Moving").count(), 1);
        let whole =
            "a\n<!-- figures: written by `godwit-bench spec` -->\nold\n<!-- end of figures -->\nb";
        let whole = within(whole, &page).expect("marks");
        assert!(whole.starts_with("a\n") && whole.ends_with("\nb") && whole.contains(&page));
        assert!(!whole.contains("old"));
        assert_eq!(within("no marks", &page), None);
        let again: Figures = serde_json::from_str(&all.json().expect("written")).expect("read");
        assert_eq!(again, all);
    }

    #[test]
    fn a_cell_longer_than_a_line_is_refused_by_name() {
        let mut f = one(None, series());
        f.shown_by = "x".repeat(LINE + 1);
        let all = Figures { schema: SCHEMA, figures: vec![f] };
        let words = all.markdown().expect_err("too long").to_string();
        assert!(words.contains("'down'"), "{words}");
    }

    #[test]
    fn the_figures_of_this_tree_are_read_and_fit_the_page() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/figures.json");
        let all = Figures::read(&path).expect("docs/figures.json");
        all.markdown().expect("every cell fits");
    }
}
