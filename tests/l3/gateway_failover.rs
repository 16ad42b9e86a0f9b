//! Tests of failover: another node takes over from a failed gateway node.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::events::v1::Event;
use kube::{Api, api::ListParams};
use raven_api::{Gateway, gateway::EndpointType};
use raven_tests::{Lab, eventually, probe, probe::Flow, proof, require_root};

use crate::Running;

/// Rate of the flows in datagrams per second.
const RATE: u32 = 500;

#[tokio::test(flavor = "multi_thread")]
async fn member_takes_over_when_gateway_node_fails() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let lab = &running.lab;
    let gateways: Api<Gateway> = Api::all(lab.cluster().client());
    // Flows of other pools lose nothing; the pool's own flow recovers soon.
    let (bystander, own_pod) = (lab.pod("y-b"), lab.pod("x-b"));
    let to = lab.pod("cloud-b");
    let other_flow = running.check(Flow::start(&bystander.ns, &to.ns, to.v4.into(), RATE));
    let own_flow = running.check(Flow::start(&own_pod.ns, &to.ns, to.v4.into(), RATE));
    let begin = Instant::now();
    running.check(lab.cluster().set_ready("x-a", false).await);
    let took = running.until("x-b", "CONFIG", "\"tunnel_port\":4500", true).await;
    println!("convergence: the gateway node is replaced: {} ms from the API to the map of x-b", took.as_millis());
    let moved = eventually(Duration::from_secs(20), "x-b is elected", || async {
        let status = gateways.get("edge-x").await?.status.context("the Gateway has no status")?;
        let elected =
            status.active_endpoints.iter().find(|e| e.type_ == EndpointType::Tunnel).context("no node is elected")?;
        ensure!(elected.node_name == "x-b", "{} is elected", elected.node_name);
        Ok(())
    });
    running.check(moved.await);
    let back = || async { probe::ping(&own_pod.ns, to.v4.into()).await?.context("no answer") };
    running.check(eventually(proof::CONVERGENCE, "x-b reaches cloud-b", back).await);
    println!(
        "convergence: the gateway node is replaced: {} ms until its pods reach other pools again",
        begin.elapsed().as_millis()
    );
    let (other_flow, own_flow) = (running.check(other_flow.stop().await), running.check(own_flow.stop().await));
    println!(
        "convergence: the pool's flow was interrupted for {} ms; another pool's: {other_flow:?}",
        own_flow.longest_gap.as_millis()
    );
    assert_eq!(other_flow.lost, 0, "another pool's flow: {other_flow:?}");
    // From a pod of the new gateway node, and from one of the previous gateway node.
    for from in ["x-b", "x-a"] {
        for to in ["cloud-b", "y-b"] {
            for address in lab.pod(to).addresses() {
                let what = format!("{from} reaches {address} of {to} again");
                let answer = eventually(proof::CONVERGENCE, &what, || async {
                    probe::ping(&lab.pod(from).ns, address).await?.context("no answer")
                });
                running.check(answer.await);
            }
        }
    }
    let demoted = eventually(Duration::from_secs(10), "x-a is a member", || async {
        let devices = lab.node("x-a").ns.sh("ip -o link show; ls /sys/fs/bpf/raven/v1/links")?;
        ensure!(!devices.contains("raven-wg0"), "x-a still has a tunnel: {devices}");
        ensure!(!devices.contains("uplink_xdp"), "x-a still has an XDP program: {devices}");
        Ok(())
    });
    running.check(demoted.await);
}

/// A gateway node whose node is Ready, but whose links to all other pools are cut by a firewall, is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn ready_but_unreachable_gateway_node_is_replaced() {
    require_root!();
    let lab = Lab::builder().up().await.expect("start the lab");
    // The firewall allows connections to the API server.
    let cloud = lab.cloud().public_v4;
    let firewall = format!(
        "table inet firewall {{ chain out {{ type filter hook output priority 0; \
         ip daddr {cloud} udp dport 4500 drop; ip daddr {cloud} tcp dport 10262 drop; }}; }}\n"
    );
    lab.node("x-a").ns.nft(&firewall).expect("load the firewall's rules");
    let running = Running::begin(lab).await.expect("start controller and agents");
    let api = Api::<Gateway>::all(running.lab.cluster().client());
    let elected = async |name: &str, type_: EndpointType| -> Result<String> {
        let status = api.get(name).await?.status.context("the Gateway has no status")?;
        let elected = status.active_endpoints.iter().find(|e| e.type_ == type_).context("no node is elected")?;
        Ok(elected.node_name.clone())
    };
    let begin = Instant::now();
    let first = eventually(Duration::from_secs(20), "x-a is elected", || async {
        ensure!(elected("edge-x", EndpointType::Tunnel).await? == "x-a");
        Ok(())
    });
    running.check(first.await);
    // The controller waits for a minute before it replaces the node.
    let moved = eventually(Duration::from_secs(100), "x-b is elected", || async {
        for type_ in [EndpointType::Tunnel, EndpointType::Proxy] {
            let node = elected("edge-x", type_).await?;
            ensure!(node == "x-b", "{node} is elected");
        }
        Ok(())
    });
    running.check(moved.await);
    println!("convergence: an unreachable gateway node is replaced: {} s after the start", begin.elapsed().as_secs());
    running.check(proof::converged(&running.lab).await);
    assert_eq!(
        running.check(elected("edge-y", EndpointType::Tunnel).await),
        "y-a",
        "no other pool changes its gateway node"
    );
    let events: Api<Event> = Api::all(running.lab.cluster().client());
    let reported = eventually(Duration::from_secs(10), "an Event reports the reason", || async {
        let notes =
            events.list(&ListParams::default()).await?.items.into_iter().filter_map(|e| e.note).collect::<Vec<_>>();
        ensure!(notes.iter().any(|note| note.contains("x-b replaces x-a (it is Ready but cut off")), "{notes:?}");
        Ok(())
    });
    running.check(reported.await);
}
