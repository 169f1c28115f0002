//! The results file, `results.json`. Readers check `schema` first.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::MachineInfo;
use super::stats::{Summary, paired_ratios, summary};
use crate::link::LinkSpec;

/// Version of the results file. It grows when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 1;

/// Everything that one run of a suite found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The suite's name.
    pub suite: String,
    /// Start of the run, RFC 3339.
    pub started: String,
    /// How long it took in seconds.
    pub took_s: f64,
    /// Whether it was a quick run with few rounds.
    pub quick: bool,
    /// Where it ran.
    pub machine: MachineInfo,
    /// Commit of the tree it was run from, where known.
    pub git_rev: Option<String>,
    /// Accelerator of the guests, where there were any.
    pub accel: Option<String>,
    /// Guest image, where there was one.
    pub guest: Option<String>,
    /// The emulated link, where there was one.
    pub link: Option<LinkInfo>,
    /// What was measured.
    pub experiments: Vec<Experiment>,
    /// Tables that set several experiments side by side.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<Table>,
    /// Pictures that are no plot of an experiment; each is a file beside this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pictures: Vec<Picture>,
    /// Whole reports of single rounds, by subject, for what no figure shows.
    pub reports: BTreeMap<String, Vec<serde_json::Value>>,
    /// What a reader must know: what was emulated, left out, or failed.
    pub notes: Vec<String>,
}

/// A table of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Its title.
    pub name: String,
    /// What it shows.
    pub about: String,
    /// Heads of its columns.
    pub head: Vec<String>,
    /// Its rows, each as long as the head.
    pub rows: Vec<Vec<String>>,
}

/// A picture of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picture {
    /// Its name; also its file's, with `.svg`.
    pub name: String,
    /// What it shows.
    pub about: String,
    /// The picture; it is in its file, not among the results.
    #[serde(skip)]
    pub svg: String,
}

/// The link of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LinkInfo {
    /// Rate each way in Mbit/s.
    pub rate_mbit: f64,
    /// Round trip in ms.
    pub rtt_ms: f64,
    /// Jitter each way in ms.
    pub jitter_ms: f64,
    /// Share of packets lost each way.
    pub loss: f64,
    /// Queue in ms at the full rate.
    pub queue_ms: f64,
}

impl From<&LinkSpec> for LinkInfo {
    fn from(s: &LinkSpec) -> Self {
        Self {
            rate_mbit: s.a_to_b.rate_mbit,
            rtt_ms: s.rtt_ms(),
            jitter_ms: s.a_to_b.jitter_ms,
            loss: s.a_to_b.loss,
            queue_ms: s.a_to_b.queue_ms,
        }
    }
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
}

/// One quantity, measured for one or several subjects in the same rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Experiment {
    /// Its name, e.g. `switch`; also the plot's file name.
    pub name: String,
    /// What it is, with where it begins and ends.
    pub about: String,
    /// Unit of all values.
    pub unit: String,
    /// Which way is better.
    pub better: Better,
    /// One series for each subject.
    pub series: Vec<Series>,
    /// The first subject against each of the others.
    pub comparisons: Vec<Comparison>,
}

/// The values of one subject.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Who was measured.
    pub subject: String,
    /// All raw values, in the order of the rounds.
    pub values: Vec<f64>,
    /// Of `values`; none when every round failed.
    pub summary: Option<Summary>,
    /// A figure to reach, in the same unit.
    pub target: Option<f64>,
}

/// One subject against another, round by round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The subject above the line.
    pub subject: String,
    /// The subject below it.
    pub against: String,
    /// `subject / against` in each round.
    pub ratios: Vec<f64>,
    /// Of `ratios`.
    pub summary: Option<Summary>,
}

impl Experiment {
    /// An experiment without values.
    #[must_use]
    pub fn new(name: &str, about: &str, unit: &str, better: Better) -> Self {
        Self {
            name: name.into(),
            about: about.into(),
            unit: unit.into(),
            better,
            series: Vec::new(),
            comparisons: Vec::new(),
        }
    }

    /// Adds a round's value for `subject`.
    pub fn push(&mut self, subject: &str, value: f64) {
        match self.series.iter_mut().find(|s| s.subject == subject) {
            Some(s) => s.values.push(value),
            None => self.series.push(Series {
                subject: subject.into(),
                values: vec![value],
                summary: None,
                target: None,
            }),
        }
    }

    /// Sets a figure to reach for `subject`, if it has values.
    pub fn target(&mut self, subject: &str, value: f64) {
        if let Some(s) = self.series.iter_mut().find(|s| s.subject == subject) {
            s.target = Some(value);
        }
    }

    /// Fills in summaries and comparisons.
    pub fn finish(&mut self) {
        for s in &mut self.series {
            s.summary = summary(&s.values);
        }
        self.comparisons = match self.series.split_first() {
            Some((first, others)) => others
                .iter()
                .map(|other| {
                    let ratios = paired_ratios(&first.values, &other.values);
                    Comparison {
                        subject: first.subject.clone(),
                        against: other.subject.clone(),
                        summary: summary(&ratios),
                        ratios,
                    }
                })
                .collect(),
            None => Vec::new(),
        };
    }
}
