//! `bench transit`: packets per CPU-second of a gateway node's hop, by four variants, in both directions.
//!
//! (a) the fast tier, (b) the fallback tier, (c) the kernel's forwarding with conntrack and the rules that upstream's
//! agent installs, (d) the kernel's forwarding only. Variants alternate within a run; the median counts.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use comfy_table::{Table, presets::ASCII_MARKDOWN};
use raven_agent::bpf::Hook;
use serde_json::json;

use crate::{
    hop::{Direction, Hop, Programs},
    median,
};

/// Duration of one measurement.
const TIME: Duration = Duration::from_millis(700);
/// Numbers of remote prefixes to measure.
const PREFIXES: [u32; 3] = [10, 1_000, 100_000];
/// Number of prefixes for which the two ratios are printed.
const RATIO_AT: u32 = 1_000;

/// A variant of forwarding through the gateway node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Fast,
    Fallback,
    Netfilter,
    Forwarding,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Fallback => "fallback",
            Self::Netfilter => "kernel+netfilter",
            Self::Forwarding => "kernel",
        }
    }

    fn description(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Fast, Direction::ToTunnel) => "(a) XDP + TC redirect",
            (Self::Fast, Direction::ToOverlay) => "(a) wrapped in place, redirect by neighbour",
            (Self::Fallback, Direction::ToTunnel) => "(b) TC on raven0",
            (Self::Fallback, Direction::ToOverlay) => "(b) tunnel key and raven0",
            (Self::Netfilter, _) => "(c) kernel, conntrack and upstream's rules",
            (Self::Forwarding, _) => "(d) kernel forwarding only",
        }
    }
}

/// One row of the result.
struct Line {
    variant: Variant,
    direction: Direction,
    prefixes: u32,
    kpps: f64,
}

/// Runs the benchmark.
pub(crate) fn run(object: &Path, runs: usize, json: bool) -> Result<()> {
    let mut lines = Vec::new();
    for prefixes in PREFIXES {
        eprintln!("· {prefixes} prefixes");
        let mut hop = Hop::new(object, prefixes)?;
        lines.extend(to_tunnel(&mut hop, prefixes, runs)?);
        lines.extend(to_overlay(&mut hop, prefixes, runs)?);
    }
    let ratio = |other| ratio(&lines, Direction::ToTunnel, RATIO_AT, other);
    let (to_netfilter, to_forwarding) = (ratio(Variant::Netfilter)?, ratio(Variant::Forwarding)?);
    if json {
        let variants: Vec<_> = lines
            .iter()
            .map(|l| json!({ "name": l.variant.name(), "direction": direction_name(l.direction), "prefixes": l.prefixes, "kpps_per_cpu_s": round(l.kpps) }))
            .collect();
        println!(
            "{}",
            json!({ "variants": variants, "ratio_to_netfilter": round(to_netfilter), "ratio_to_forwarding": round(to_forwarding) })
        );
    } else {
        println!("{}", table(&lines)?);
        println!("\noverlay → tunnel at {RATIO_AT} prefixes: {to_netfilter:.2} × (c), {to_forwarding:.2} × (d)");
    }
    Ok(())
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::ToTunnel => "overlay->tunnel",
        Direction::ToOverlay => "tunnel->overlay",
    }
}

/// Converts nanoseconds per packet to packets per millisecond of CPU time.
fn kpps(nanoseconds: f64) -> f64 {
    1_000_000.0 / nanoseconds
}

/// Measures the variants alternately. Returns the median of nanoseconds per packet for each variant.
fn alternate(hop: &mut Hop, direction: Direction, variants: &[Variant], runs: usize) -> Result<Vec<(Variant, f64)>> {
    let mut samples: Vec<Vec<f64>> = vec![Vec::new(); variants.len()];
    for _ in 0..runs {
        for (n, variant) in variants.iter().enumerate() {
            let setup = Setup::new(hop, *variant, direction)?;
            let sample = hop.measure(direction, TIME)?;
            anyhow::ensure!(
                sample.packets > 1_000,
                "{}: only {} packets arrived in {TIME:?}, too few for a measurement",
                variant.description(direction),
                sample.packets
            );
            samples[n].push(sample.nanoseconds());
            setup.remove(hop)?;
        }
    }
    Ok(variants.iter().copied().zip(samples.iter().map(|samples| median(samples))).collect())
}

fn to_tunnel(hop: &mut Hop, prefixes: u32, runs: usize) -> Result<Vec<Line>> {
    let variants = [Variant::Fast, Variant::Fallback, Variant::Netfilter, Variant::Forwarding];
    let measured = alternate(hop, Direction::ToTunnel, &variants, runs)?;
    let line = |(variant, ns)| Line { variant, direction: Direction::ToTunnel, prefixes, kpps: kpps(ns) };
    Ok(measured.into_iter().map(line).collect())
}

/// The cost of the feed is measured in the same run and subtracted from every variant.
fn to_overlay(hop: &mut Hop, prefixes: u32, runs: usize) -> Result<Vec<Line>> {
    let variants = [Variant::Fast, Variant::Fallback, Variant::Netfilter, Variant::Forwarding];
    let measured = alternate(hop, Direction::ToOverlay, &variants, runs)?;
    let feed = feed(hop, runs)?;
    let line = |(variant, ns): (Variant, f64)| Line {
        variant,
        direction: Direction::ToOverlay,
        prefixes,
        kpps: kpps((ns - feed).max(1.0)),
    };
    Ok(measured.into_iter().map(line).collect())
}

/// Measures the nanoseconds per packet up to the L3 device, where packets are dropped. Must be the last measurement,
/// because the setup forwards no packets afterwards.
fn feed(hop: &mut Hop, runs: usize) -> Result<f64> {
    hop.end_at_feed()?;
    let samples: Result<Vec<f64>> =
        (0..runs).map(|_| Ok(hop.measure(Direction::ToOverlay, TIME)?.nanoseconds())).collect();
    Ok(median(&samples?))
}

/// An installed variant.
struct Setup {
    variant: Variant,
    _programs: Option<Programs>,
}

impl Setup {
    fn new(hop: &Hop, variant: Variant, direction: Direction) -> Result<Self> {
        hop.overlay_device(matches!(variant, Variant::Fast | Variant::Fallback))?;
        let programs = match (variant, direction) {
            (Variant::Fast, Direction::ToTunnel) => Some(hop.programs(
                &[(Hook::UplinkIngress, "eth0"), (Hook::UplinkXdp, "eth0"), (Hook::OverlayIngress, "raven0")],
                0,
            )?),
            (Variant::Fallback, Direction::ToTunnel) => Some(hop.programs(&[(Hook::OverlayIngress, "raven0")], 0)?),
            (Variant::Fast, Direction::ToOverlay) => Some(hop.programs(&[(Hook::TunnelIngress, "tun0")], 0)?),
            (Variant::Fallback, Direction::ToOverlay) => Some(hop.programs(
                &[(Hook::TunnelIngress, "tun0"), (Hook::OverlayEgress, "raven0")],
                raven_common::tables::CONFIG_NO_WRAP,
            )?),
            (Variant::Netfilter | Variant::Forwarding, _) => {
                hop.routes("9028")?;
                hop.inside("gw", "ip rule add pref 101 lookup 9028")?;
                None
            }
        };
        if variant == Variant::Netfilter {
            upstream_rules(hop)?;
        }
        Ok(Self { variant, _programs: programs })
    }

    fn remove(self, hop: &Hop) -> Result<()> {
        if matches!(self.variant, Variant::Netfilter | Variant::Forwarding) {
            hop.inside("gw", "ip rule del pref 101; ip route flush table 9028")?;
        }
        if self.variant == Variant::Netfilter {
            hop.inside("gw", "iptables -t mangle -F; iptables -t mangle -X; iptables -t nat -F; iptables -t nat -X; iptables -F; ip rule del pref 100; ipset destroy")?;
        }
        Ok(())
    }
}

/// Installs the rules of upstream's agent on a gateway node: marks by ipset in PREROUTING and OUTPUT, the exemption
/// from source NAT by ipset in POSTROUTING, a rule for the mark, and conntrack, which NAT implies.
///
/// Upstream's second set has the type hash:net,net. Two sets of type hash:net replace it, because some
/// kernels lack the type.
fn upstream_rules(hop: &Hop) -> Result<()> {
    let mut sets =
        "create raven-mark-set hash:net maxelem 262144\ncreate raven-skip-nat-set hash:net maxelem 262144\n".to_owned();
    for prefix in hop.remote_prefixes() {
        let prefix = std::net::Ipv4Addr::from(prefix);
        sets += &format!("add raven-mark-set {prefix}/28\nadd raven-skip-nat-set {prefix}/28\n");
    }
    sets += "add raven-skip-nat-set 10.244.2.0/24\n";
    let file = std::env::temp_dir().join("raven-bench.ipset");
    std::fs::write(&file, sets).context("write the sets")?;
    hop.inside(
        "gw",
        &format!(
            "ipset restore < {}
             iptables -t mangle -N RAVEN-MARK-CHAIN
             iptables -t mangle -A RAVEN-MARK-CHAIN -m set --match-set raven-mark-set dst -j MARK --set-mark 0x40
             iptables -t mangle -A PREROUTING -j RAVEN-MARK-CHAIN
             iptables -t mangle -A OUTPUT -j RAVEN-MARK-CHAIN
             iptables -t nat -N RAVEN-POSTROUTING
             iptables -t nat -A RAVEN-POSTROUTING -m set --match-set raven-skip-nat-set src -m set --match-set raven-skip-nat-set dst -j ACCEPT
             iptables -t nat -A POSTROUTING -j RAVEN-POSTROUTING
             iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP
             ip rule add pref 100 fwmark 0x40 lookup 9027",
            file.display()
        ),
    )?;
    std::fs::remove_file(file)?;
    Ok(())
}

fn ratio(lines: &[Line], direction: Direction, prefixes: u32, other: Variant) -> Result<f64> {
    let of = |variant| {
        let line = lines.iter().find(|l| l.variant == variant && l.direction == direction && l.prefixes == prefixes);
        line.map(|l| l.kpps).context("the variant was not measured")
    };
    Ok(of(Variant::Fast)? / of(other)?)
}

fn table(lines: &[Line]) -> Result<Table> {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "direction",
        "variant",
        "prefixes",
        "kpps per CPU-second",
        "× (c)",
        "× (d)",
    ]);
    for line in lines {
        let of = |variant| {
            let other = lines
                .iter()
                .find(|l| l.variant == variant && l.direction == line.direction && l.prefixes == line.prefixes);
            other.map_or(f64::NAN, |o| line.kpps / o.kpps)
        };
        table.add_row([
            direction_name(line.direction).replace("->", " → "),
            line.variant.description(line.direction).to_owned(),
            line.prefixes.to_string(),
            format!("{:.0}", line.kpps),
            format!("{:.2}", of(Variant::Netfilter)),
            format!("{:.2}", of(Variant::Forwarding)),
        ]);
    }
    Ok(table)
}
