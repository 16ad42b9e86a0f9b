//! The elected gateway node fails; another takes over.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::events::v1::Event;
use kube::{Api, api::ListParams};
use raven_api::{Gateway, gateway::EndpointType};
use raven_tests::{Lab, eventually, privileged, probe, probe::Flow, proof};

use crate::{Running, live_change::lost_at_most};

/// Datagrams a second.
const RATE: u32 = 500;

#[tokio::test(flavor = "multi_thread")]
async fn the_other_node_takes_over_when_the_gateway_node_fails() {
    if !privileged("the_other_node_takes_over_when_the_gateway_node_fails") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let lab = &running.lab;
    let gateways: Api<Gateway> = Api::all(lab.cluster().client());
    // Who has nothing to do with it loses nothing; who does is back soon.
    let (bystander, own_pod) = (lab.pod("y-b"), lab.pod("x-b"));
    let to = lab.pod("cloud-b");
    let others = running.check(Flow::start(&bystander.ns, &to.ns, to.v4.into(), RATE));
    let own = running.check(Flow::start(&own_pod.ns, &to.ns, to.v4.into(), RATE));
    let begin = Instant::now();
    running.check(lab.cluster().set_ready("x-a", false).await);
    let took = running.until("x-b", "CONFIG", "\"tunnel_port\":4500", true).await;
    println!("convergence: the gateway node is replaced: {} ms from the API to the map of x-b", took.as_millis());
    let moved = eventually(Duration::from_secs(20), "x-b is elected", || async {
        let status = gateways.get("edge-x").await?.status.context("a status")?;
        let elected = status.active_endpoints.iter().find(|e| e.type_ == EndpointType::Tunnel).context("an elected node")?;
        ensure!(elected.node_name == "x-b", "{} is elected", elected.node_name);
        Ok(())
    });
    running.check(moved.await);
    let back = || async { probe::ping(&own_pod.ns, to.v4.into()).await?.context("no answer") };
    running.check(eventually(proof::CONVERGENCE, "x-b reaches cloud-b", back).await);
    println!("convergence: the gateway node is replaced: {} ms until its pods reach others again", begin.elapsed().as_millis());
    let (others, own) = (running.check(others.stop().await), running.check(own.stop().await));
    println!("convergence: the site's flow was interrupted for {} ms; another site's: {others:?}", own.longest_gap.as_millis());
    // None but for the embedded engine (see `live_change`): the cloud's stands still while it takes one peer away and gets another, and the
    // other site's remakes its session with the cloud when the moving site's prefixes go, and when they come back.
    assert!(others.lost <= lost_at_most(4, RATE), "another site's flow: {others:?}");
    // The new gateway node's pod, and one of the node that was it before.
    for from in ["x-b", "x-a"] {
        for to in ["cloud-b", "y-b"] {
            for address in lab.pod(to).addresses() {
                let what = format!("{from} reaches {address} of {to} again");
                let answer =
                    eventually(proof::CONVERGENCE, &what, || async { probe::ping(&lab.pod(from).ns, address).await?.context("no answer") });
                running.check(answer.await);
            }
        }
    }
    let demoted = eventually(Duration::from_secs(10), "x-a is an ordinary node", || async {
        let devices = lab.node("x-a").ns.sh("ip -o link show; ls /sys/fs/bpf/raven/v1/links")?;
        ensure!(!devices.contains("raven-wg0"), "it has a tunnel: {devices}");
        ensure!(!devices.contains("uplink_xdp"), "it has an XDP program: {devices}");
        Ok(())
    });
    running.check(demoted.await);
}

/// FAULTS.md, 12: a gateway node whose node is Ready and whose link to all others is cut (a firewall on the box) gives way.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_node_that_is_ready_and_cut_off_is_replaced() {
    if !privileged("a_gateway_node_that_is_ready_and_cut_off_is_replaced") {
        return;
    }
    let lab = Lab::builder().up().await.expect("the lab starts");
    // The way to the API server is open.
    let cloud = lab.cloud().public_v4;
    let firewall = format!(
        "table inet firewall {{ chain out {{ type filter hook output priority 0; \
         ip daddr {cloud} udp dport 4500 drop; ip daddr {cloud} tcp dport 10262 drop; }}; }}\n"
    );
    lab.node("x-a").ns.nft(&firewall).expect("a firewall");
    let running = Running::begin(lab).await.expect("controller and agents start");
    let api = Api::<Gateway>::all(running.lab.cluster().client());
    let elected = async |name: &str, type_: EndpointType| -> Result<String> {
        let status = api.get(name).await?.status.context("a status")?;
        let elected = status.active_endpoints.iter().find(|e| e.type_ == type_).context("an elected node")?;
        Ok(elected.node_name.clone())
    };
    let begin = Instant::now();
    let first = eventually(Duration::from_secs(20), "x-a is elected", || async {
        ensure!(elected("edge-x", EndpointType::Tunnel).await? == "x-a");
        Ok(())
    });
    running.check(first.await);
    // After the minute that it is given.
    let moved = eventually(Duration::from_secs(100), "x-b is elected", || async {
        for type_ in [EndpointType::Tunnel, EndpointType::Proxy] {
            let node = elected("edge-x", type_).await?;
            ensure!(node == "x-b", "{node} is elected");
        }
        Ok(())
    });
    running.check(moved.await);
    println!("convergence: a gateway node that is cut off is replaced: {} s after the start", begin.elapsed().as_secs());
    running.check(proof::converged(&running.lab).await);
    assert_eq!(running.check(elected("edge-y", EndpointType::Tunnel).await), "y-a", "nobody else is moved");
    let events: Api<Event> = Api::all(running.lab.cluster().client());
    let told = eventually(Duration::from_secs(10), "an Event says why", || async {
        let notes = events.list(&ListParams::default()).await?.items.into_iter().filter_map(|e| e.note).collect::<Vec<_>>();
        ensure!(notes.iter().any(|note| note.contains("x-b replaces x-a (it is Ready but cut off")), "{notes:?}");
        Ok(())
    });
    running.check(told.await);
}
