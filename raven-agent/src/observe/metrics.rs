//! Metrics, made from what is there when they are asked for: counters of the maps, and the last run.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use raven_common::tables::NO_GATEWAY;

use crate::{apply::Report, bpf, proxy::stats::Stats};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    gateway: String,
    verdict: &'static str,
}

type Counters = Family<Labels, Counter<u64, AtomicU64>>;

/// The metrics in OpenMetrics text.
pub(super) fn render(report: Option<&Report>, proxy: &Stats) -> Result<String, String> {
    let mut registry = Registry::default();
    proxy.register(&mut registry);
    let (packets, bytes) = (Counters::default(), Counters::default());
    registry.register("raven_packets", "Packets by what was done with them and the Gateway they were for or from", packets.clone());
    registry.register("raven_bytes", "Bytes of these packets", bytes.clone());
    for ((gateway, verdict), count) in bpf::counters().map_err(|e| e.to_string())? {
        let labels = Labels { gateway: name(report, gateway), verdict: verdict.as_str() };
        packets.get_or_create(&labels).inc_by(count.packets);
        bytes.get_or_create(&labels).inc_by(count.bytes);
    }
    if let Some(report) = report {
        gauge(&mut registry, "raven_apply_failures", "Things that the last run could not do", report.failures.len());
        gauge(&mut registry, "raven_plan_problems", "Parts of the topology that cannot be had as they are", report.plan.problems.len());
        gauge(&mut registry, "raven_peers", "WireGuard peers that are planned", report.plan.state.peers.len());
        gauge(&mut registry, "raven_remote_prefixes", "Prefixes of other pools", report.plan.state.remote.len());
    }
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|e| e.to_string())?;
    Ok(text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: usize) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

/// A Gateway that is gone keeps its counters under its number.
fn name(report: Option<&Report>, id: u32) -> String {
    match report.and_then(|r| r.plan.gateway_names.get(&id)) {
        Some(name) => name.clone(),
        None if id == NO_GATEWAY => String::new(),
        None => format!("{id:#010x}"),
    }
}
