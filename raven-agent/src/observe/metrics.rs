//! Metrics, rendered on request from the maps' counters, the last report and the proxy's counters.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use raven_common::tables::NO_GATEWAY;

use crate::{apply::Report, bpf, link::Neighbours, names, proxy::stats::Stats};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    gateway: String,
    verdict: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabel {
    family: &'static str,
}

type FamilyCounters = Family<FamilyLabel, Counter<u64, AtomicU64>>;
type Counters = Family<Labels, Counter<u64, AtomicU64>>;

/// The metrics in OpenMetrics text.
pub(super) fn render(report: Option<&Report>, proxy: &Stats) -> Result<String, String> {
    let mut registry = Registry::default();
    proxy.register(&mut registry);
    let (packets, bytes) = (Counters::default(), Counters::default());
    registry.register(
        "raven_packets",
        "Packets by verdict and by the Gateway of their source or destination",
        packets.clone(),
    );
    registry.register(
        "raven_bytes",
        "Bytes by verdict and by the Gateway of their source or destination",
        bytes.clone(),
    );
    for ((gateway, verdict), count) in bpf::counters().map_err(|e| e.to_string())? {
        let labels = Labels { gateway: name(report, gateway), verdict: verdict.as_str() };
        packets.get_or_create(&labels).inc_by(count.packets);
        bytes.get_or_create(&labels).inc_by(count.bytes);
    }
    if let Some(report) = report {
        let restored: Counter = Counter::default();
        restored.inc_by(report.restored);
        let help = "Routes, rules, devices, map entries and programs restored after an external change, or applied after a failure";
        registry.register("raven_restored", help, restored);
        gauge(&mut registry, "raven_apply_failures", "Steps of the last run that failed", report.failures.len());
        gauge(
            &mut registry,
            "raven_plan_problems",
            "Problems in the topology that limit the plan",
            report.plan.problems.len(),
        );
        gauge(&mut registry, "raven_peers", "Planned WireGuard peers", report.plan.state.peers.len());
        gauge(
            &mut registry,
            "raven_remote_prefixes",
            "Planned prefixes of other pools",
            report.plan.state.remote.len(),
        );
        neighbours(&mut registry, &report.neighbours);
    }
    let refused: Counter = Counter::default();
    refused.inc_by(refused_by_wireguard());
    registry.register(
        "raven_tunnel_refused_packets",
        "Packets refused by the kernel's WireGuard: not IP, or from a source outside the peer's allowed IPs (the embedded engine does not count them)",
        refused,
    );
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|e| e.to_string())?;
    Ok(text)
}

/// Packets that the kernel loses after Raven's programs have counted them as forwarded.
fn neighbours(registry: &mut Registry, found: &Neighbours) {
    gauge(
        registry,
        "raven_neighbours_unresolved",
        "Nodes of this node's pool that do not answer ARP, so that packets for them are lost; /status lists them",
        found.unresolved.len(),
    );
    let (failures, overflows) = (FamilyCounters::default(), FamilyCounters::default());
    for (family, losses) in [("ipv4", found.v4), ("ipv6", found.v6)] {
        failures.get_or_create(&FamilyLabel { family }).inc_by(losses.failures);
        overflows.get_or_create(&FamilyLabel { family }).inc_by(losses.overflows);
    }
    registry.register(
        "raven_neighbour_failures",
        "Neighbours that the kernel could not resolve, of all devices of this node",
        failures,
    );
    registry.register(
        "raven_neighbour_overflows",
        "New neighbours that did not fit into the kernel's table: increase net.FAMILY.neigh.default.gc_thresh3",
        overflows,
    );
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: usize) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

/// The name of a Gateway; the counters of a deleted one keep its id.
fn name(report: Option<&Report>, id: u32) -> String {
    match report.and_then(|r| r.plan.gateway_names.get(&id)) {
        Some(name) => name.clone(),
        None if id == NO_GATEWAY => String::new(),
        None => format!("{id:#010x}"),
    }
}

/// The device counter for refused packets (drivers/net/wireguard/receive.c).
fn refused_by_wireguard() -> u64 {
    let path = format!("/sys/class/net/{}/statistics/rx_frame_errors", names::TUNNEL);
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
