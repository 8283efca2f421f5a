//! Metric families that a program adds to `/metrics`.

/// A metric with all its series. A program that adds some gives them to [`Admin::metrics`](super::Admin::metrics).
///
/// ```
/// use shutdown_tower::admin::Family;
///
/// let depth = Family::gauge("queue_depth", "Jobs that wait.")
///     .sample(&[("queue", "mail")], 3.0)
///     .sample(&[("queue", "images")], 0.0);
/// # drop(depth);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    pub(super) help: &'static str,
    pub(super) samples: Vec<Sample>,
}

/// One series' value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) labels: Vec<(&'static str, String)>,
    pub(super) value: f64,
}

impl Family {
    /// A value that goes up and down.
    pub fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: "gauge", help, samples: Vec::new() }
    }

    /// A count that only grows; by custom its name ends in `_total`.
    pub fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: "counter", help, samples: Vec::new() }
    }

    /// Adds a series. Of two with the same labels the first counts; their order says nothing.
    #[must_use]
    pub fn sample(mut self, labels: &[(&'static str, &str)], value: f64) -> Self {
        let mut labels: Vec<_> = labels.iter().map(|(key, text)| (*key, (*text).to_owned())).collect();
        labels.sort();
        self.samples.push(Sample { labels, value });
        self
    }
}
