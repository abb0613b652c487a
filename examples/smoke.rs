//! temp
use cryosleep::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    match a[1].as_str() {
        "dump" => {
            let d = Checkpoint::of(a[2].parse::<u32>().unwrap())
                .after(if a.len() > 4 { AfterDump::Resume } else { AfterDump::Kill })
                .write_to(&a[3]);
            match d {
                Ok(d) => println!("{:?}", d.stats),
                Err(e) => println!("ERR {e}"),
            }
        }
        _ => match Restore::from(&a[2]).outer_session(OuterSession::Inherit).run() {
            Ok(r) => {
                println!("{} {:?}", r.pid(), r.stats);
                println!("{:?}", r.wait());
            }
            Err(e) => println!("ERR {e}"),
        },
    }
}
