//! Samples of dropped packets from the programs' ring buffer, for `/drops`: one JSON object per line.

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

/// Number of samples that are kept.
const KEPT: usize = 256;
/// Interval at which the buffer is read. It holds about 4,000 samples, and each CPU writes at most 100 per second.
const PERIOD: Duration = Duration::from_millis(500);

/// The last samples, the oldest first; clones share them.
#[derive(Clone, Default)]
pub struct Drops {
    samples: Arc<Mutex<VecDeque<DropSample>>>,
}

/// A line of `/drops`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    /// Seconds since boot, as in dmesg.
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
    /// Reads the ring buffer until the process ends. After a failure only samples are missing; counters
    /// are not affected.
    pub async fn read(self) {
        if let Err(e) = self.follow().await {
            tracing::warn!(error = e, "cannot read samples of dropped packets; counters are not affected");
        }
    }

    async fn follow(&self) -> Result<(), String> {
        let path = Path::new(names::PINS).join("maps/EVENTS");
        let data = MapData::from_pin(&path).map_err(|e| e.to_string())?;
        let mut ring = RingBuf::try_from(Map::RingBuf(data)).map_err(|e| e.to_string())?;
        // Polled, because tokio's API to wait for a foreign file descriptor is unsafe, and samples are not urgent.
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
        tracing::debug!(
            reason = Verdict::from_number(sample.verdict).map(Verdict::as_str),
            ?sample,
            "dropped a packet"
        );
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == KEPT {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    /// The last samples, one line each.
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
        let end =
            |address: &[u8; 16], port: [u8; 2]| match (address_of(sample.ethertype, address), u16::from_be_bytes(port))
            {
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
