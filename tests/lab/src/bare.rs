//! A WireGuard tunnel between two nodes without Raven: the baseline of benchmarks, and the subject of the engine's tests.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{Lab, Node, agent, eventually, patience, probe, process::Process};

/// MTU of the devices in bytes: Raven's.
const MTU: u16 = 1420;

/// An implementation of WireGuard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The kernel's module.
    Kernel,
    /// `raven-agent wireguard-engine`.
    Raven,
    /// wireguard-go, the program at this path.
    Go(PathBuf),
}

/// A tunnel.
#[derive(Debug)]
pub struct Bare {
    /// Name of the devices.
    pub device: String,
    /// Addresses of both ends.
    pub v4: [Ipv4Addr; 2],
    /// IPv6 addresses of both ends.
    pub v6: [Ipv6Addr; 2],
    /// Public keys of both ends.
    pub keys: [String; 2],
    /// UDP port of the devices.
    pub port: u16,
    /// The programs, in the order of the ends; none for the kernel.
    pub engines: [Option<Process>; 2],
}

impl Bare {
    /// Starts tunnel `number` (unique in the lab) between two nodes. The second end dials the first one at `endpoint`.
    /// Waits for an answer through the tunnel.
    pub async fn start(
        lab: &Lab,
        number: u8,
        ends: [(&Node, Engine); 2],
        endpoint: impl Fn(u16) -> SocketAddr,
    ) -> Result<Self> {
        let device = format!("bare{number}");
        let port = 4500 + u16::from(number);
        let [(first, first_engine), (second, second_engine)] = &ends;
        let engines = [
            start_engine(lab, &device, first, first_engine).await?,
            start_engine(lab, &device, second, second_engine).await?,
        ];
        let keys = [make_key(&device, first)?, make_key(&device, second)?];
        first.ns.sh(&format!("wg genpsk > {}", preshared(&device)))?;
        let secret = first.ns.sh(&format!("cat {}", preshared(&device)))?;
        second.ns.sh(&format!("umask 077; echo {} > {}", secret.trim(), preshared(&device)))?;
        let v4 = [1, 2].map(|host| Ipv4Addr::new(172, 31, number, host));
        let v6 = [1, 2].map(|host| Ipv6Addr::new(0xfd31, number.into(), 0, 0, 0, 0, 0, host));
        let tunnel = Self { device, v4, v6, keys, port, engines };
        tunnel.configure(first, 0, "")?;
        tunnel.configure(second, 1, &format!("endpoint {} persistent-keepalive 15", endpoint(port)))?;
        let answers = || async { probe::ping(&second.ns, tunnel.v4[0].into()).await?.context("no answer") };
        let what = format!("the two ends of {} are connected", tunnel.device);
        eventually(Duration::from_secs(20), &what, answers).await?;
        Ok(tunnel)
    }

    fn configure(&self, node: &Node, end: usize, more: &str) -> Result<()> {
        let Self { device, port, v4, v6, keys, .. } = self;
        let other = 1 - end;
        node.ns.sh(&format!(
            "wg set {device} private-key /run/raven/{device}.key listen-port {port} \
               peer {key} preshared-key {secret} allowed-ips {v4_other}/32,{v6_other}/128 {more}
             ip addr add {v4_own}/24 dev {device}; ip addr add {v6_own}/64 dev {device} nodad
             ip link set {device} mtu {MTU} up",
            key = keys[other],
            secret = preshared(device),
            v4_own = v4[end],
            v6_own = v6[end],
            v4_other = v4[other],
            v6_other = v6[other],
        ))?;
        Ok(())
    }

    /// Makes the second end, which is `node`, forget its session and dial the first end again at `endpoint`, every second.
    pub fn dial_anew(&self, node: &Node, endpoint: SocketAddr) -> Result<()> {
        let Self { device, v4, keys, .. } = self;
        let (key, secret) = (&keys[0], preshared(device));
        node.ns.sh(&format!(
            "wg set {device} peer {key} remove
             wg set {device} peer {key} preshared-key {secret} allowed-ips {}/32 endpoint {endpoint} persistent-keepalive 1",
            v4[0]
        ))?;
        Ok(())
    }

    /// Both addresses of an end.
    pub fn addresses(&self, end: usize) -> [IpAddr; 2] {
        [self.v4[end].into(), self.v6[end].into()]
    }
}

fn preshared(device: &str) -> String {
    format!("/run/raven/{device}.psk")
}

fn make_key(device: &str, node: &Node) -> Result<String> {
    let key =
        node.ns.sh(&format!("umask 077; wg genkey > /run/raven/{device}.key; wg pubkey < /run/raven/{device}.key"))?;
    Ok(key.trim().to_owned())
}

async fn start_engine(lab: &Lab, device: &str, node: &Node, engine: &Engine) -> Result<Option<Process>> {
    let command = match engine {
        Engine::Kernel => {
            node.ns.sh(&format!("ip link add {device} type wireguard"))?;
            return Ok(None);
        }
        Engine::Raven => {
            let mut command = node.ns.command(agent::binary("raven-agent")?);
            command.args(["wireguard-engine", device]);
            command
        }
        Engine::Go(program) => {
            let mut command = node.ns.command(program);
            command.args(["-f", device]);
            command
        }
    };
    let started = Process::start(format!("{device}-{}", node.name), &lab.logs(), command)?;
    let up = || async { node.ns.run("wg", &["show", device]) };
    eventually(Duration::from_secs(10).mul_f64(patience()), "the engine responds", up).await?;
    Ok(Some(started))
}
