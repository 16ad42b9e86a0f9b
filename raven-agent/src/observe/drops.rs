//! The last dropped packets, from the programs' ring buffer: `/drops` on the metrics address, one JSON object a line.

use std::{
    collections::VecDeque,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aya::maps::{Map, MapData, RingBuf};
use raven_common::{
    Verdict,
    header::{ETH_P_IP, ETH_P_IPV6},
    tables::DropSample,
};
use serde::Serialize;

use crate::{apply::Report, names};

/// How many are kept.
const KEPT: usize = 256;
/// How often the buffer is looked at; it holds some four thousand samples, and a CPU writes at most a hundred a second.
const PERIOD: Duration = Duration::from_millis(500);

/// The last samples, oldest first.
#[derive(Clone, Default)]
pub struct Drops {
    samples: Arc<Mutex<VecDeque<DropSample>>>,
}

/// A sample as a person reads it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    /// Since boot, as dmesg counts.
    seconds: f64,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<String>,
    device: String,
    source: String,
    destination: String,
    protocol: u8,
    bytes: u32,
}

impl Drops {
    /// Reads the ring buffer until the process ends. Without it nothing is lost but samples.
    pub async fn read(self) {
        if let Err(e) = self.follow().await {
            tracing::warn!("samples of dropped packets cannot be read: {e}; counters go on");
        }
    }

    async fn follow(&self) -> Result<(), String> {
        let path = Path::new(names::PINS).join("maps/EVENTS");
        let data = MapData::from_pin(&path).map_err(|e| e.to_string())?;
        let mut ring = RingBuf::try_from(Map::RingBuf(data)).map_err(|e| e.to_string())?;
        // Looked at and not waited for: tokio's way to wait for a file descriptor of somebody else's is unsafe, and nobody
        // needs a sample within the second.
        let mut period = tokio::time::interval(PERIOD);
        loop {
            period.tick().await;
            while let Some(sample) = ring.next() {
                if let Some(sample) = DropSample::parse(&sample) {
                    self.keep(sample);
                }
            }
        }
    }

    fn keep(&self, sample: DropSample) {
        tracing::debug!(reason = Verdict::from_number(sample.verdict).map(Verdict::as_str), ?sample, "dropped");
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == KEPT {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    /// The last samples, a line each.
    pub(super) fn render(&self, report: Option<&Report>) -> String {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone();
        samples.iter().fold(String::new(), |mut text, sample| {
            let line = serde_json::to_string(&Line::new(sample, report)).unwrap_or_default();
            let _ = writeln!(text, "{line}");
            text
        })
    }
}

impl Line {
    fn new(sample: &DropSample, report: Option<&Report>) -> Self {
        let end = |address: &[u8; 16], port: [u8; 2]| match (address_of(sample.ethertype, address), u16::from_be_bytes(port)) {
            (Some(ip), 0) => ip.to_string(),
            (Some(ip), port) => std::net::SocketAddr::new(ip, port).to_string(),
            (None, _) => String::new(),
        };
        Self {
            seconds: Duration::from_nanos(sample.time_ns).as_secs_f64(),
            reason: Verdict::from_number(sample.verdict).map_or("unknown", Verdict::as_str),
            gateway: report.and_then(|r| r.plan.gateway_names.get(&sample.gateway)).cloned(),
            device: nix::net::if_::if_indextoname(sample.ifindex)
                .map_or_else(|_| sample.ifindex.to_string(), |name| name.to_string_lossy().into_owned()),
            source: end(&sample.source, sample.source_port),
            destination: end(&sample.destination, sample.destination_port),
            protocol: sample.protocol,
            bytes: sample.len,
        }
    }
}

fn address_of(ethertype: u16, bytes: &[u8; 16]) -> Option<IpAddr> {
    match ethertype {
        ETH_P_IP => Some(IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))),
        ETH_P_IPV6 => Some(IpAddr::V6(Ipv6Addr::from(*bytes))),
        _ => None,
    }
}
