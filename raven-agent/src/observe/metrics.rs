//! Metrics, made from what is there when they are asked for: counters of the maps, and the last run.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use raven_common::tables::NO_GATEWAY;

use crate::{apply::Report, bpf, names, proxy::stats::Stats};

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
        let put_back: Counter = Counter::default();
        put_back.inc_by(report.put_back);
        let help =
            "Routes, rules, devices, entries and programs that were changed though nothing new was told: somebody else had taken them away";
        registry.register("raven_put_back", help, put_back);
        gauge(&mut registry, "raven_apply_failures", "Things that the last run could not do", report.failures.len());
        gauge(&mut registry, "raven_plan_problems", "Parts of the topology that cannot be had as they are", report.plan.problems.len());
        gauge(&mut registry, "raven_peers", "WireGuard peers that are planned", report.plan.state.peers.len());
        gauge(&mut registry, "raven_remote_prefixes", "Prefixes of other pools", report.plan.state.remote.len());
    }
    let refused: Counter = Counter::default();
    refused.inc_by(refused_by_wireguard());
    registry.register(
        "raven_tunnel_refused_packets",
        "Packets that the kernel's WireGuard refused: their peer may not send from that address, or they are no IP (the embedded engine counts none)",
        refused,
    );
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

/// What the kernel counts at the tunnel's device for that (drivers/net/wireguard/receive.c).
fn refused_by_wireguard() -> u64 {
    let path = format!("/sys/class/net/{}/statistics/rx_frame_errors", names::TUNNEL);
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
