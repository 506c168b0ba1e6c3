//! What is told to others: numbers and spans.

use super::reader::Document;
use super::{TelemetrySettings, raw};

/// Where a collector takes traces, below the address that people know it by.
const TRACES_PATH: &str = "/v1/traces";

pub(super) fn telemetry(doc: &Document, raw: raw::Telemetry) -> TelemetrySettings {
    let endpoint = raw.otlp_endpoint.map(|endpoint| {
        let url = reqwest::Url::parse(&endpoint).ok();
        let is_plain = url.is_some_and(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
                && url.fragment().is_none()
        });
        if !is_plain {
            let advice = "write it as \"http://127.0.0.1:4318\"; headers go into OTEL_EXPORTER_OTLP_HEADERS";
            doc.problem(&["telemetry", "otlp_endpoint"], format!("{endpoint:?} is not a collector's URL"), advice);
        }
        let base = endpoint.trim_end_matches('/');
        if base.ends_with(TRACES_PATH) { base.to_owned() } else { format!("{base}{TRACES_PATH}") }
    });
    TelemetrySettings { metrics_are_public: raw.metrics == raw::Metrics::Public, otlp_endpoint: endpoint }
}
