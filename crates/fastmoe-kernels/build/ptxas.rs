//! What nvcc and ptxas tell about the kernels of an image.

/// An entry point: its launch shape from PTX, its resources from `ptxas -v`.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    pub name: String,
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    pub registers: u32,
    /// Stack and spills of a thread.
    pub local_bytes: u32,
}

/// The entry points of a PTX file; `log` is what `ptxas -v` said when it compiled the file.
pub fn kernels(ptx: &str, log: &str) -> Result<Vec<Kernel>, String> {
    let names = ptx.lines().filter_map(|line| line.split_once(".entry ")?.1.split('(').next());
    names.map(|name| kernel(name, ptx, log)).collect()
}

fn kernel(name: &str, ptx: &str, log: &str) -> Result<Kernel, String> {
    let [threads, shared_bytes] = launch_shape(ptx, name)
        .ok_or(format!("kernel {name} has no launch shape: PTX_KERNEL makes entry points"))?;
    let about = log
        .split_once(&format!("Function properties for {name}\n"))
        .and_then(|(_, rest)| rest.split("Function properties").next())
        .ok_or(format!("ptxas says nothing about {name}:\n{log}"))?;
    let count = |unit: &str| {
        about.split_once(unit).and_then(|(text, _)| text.split_whitespace().last()?.parse().ok())
    };
    let local = [" bytes stack frame", " bytes spill stores", " bytes spill loads"].map(count);
    let (Some(registers), [Some(stack), Some(stores), Some(loads)]) = (count(" registers"), local) else {
        return Err(format!("ptxas does not tell the registers and the local memory of {name}:\n{log}"));
    };
    Ok(Kernel {
        name: name.to_owned(),
        threads,
        shared_bytes,
        registers,
        local_bytes: stack + stores + loads,
    })
}

/// The two integers of `.b8 <name>_launch[8] = {0, 1, 0, 0, 0, 16};`, which PTX_KERNEL writes: bytes, without the
/// zeros at their end.
fn launch_shape(ptx: &str, name: &str) -> Option<[u32; 2]> {
    let list = ptx.split_once(&format!(".b8 {name}_launch[8]"))?.1.split_once(';')?.0;
    let mut bytes = [0u8; 8];
    let given = list.trim_matches([' ', '=', '{', '}']).split(',');
    for (byte, text) in bytes.iter_mut().zip(given.filter(|text| !text.is_empty())) {
        *byte = text.trim().parse().ok()?;
    }
    let [a, b, c, d, e, f, g, h] = bytes;
    Some([u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])])
}

/// Fails where a kernel has a stack or spills, unless its source says why by `// local memory: <kernel>: <reason>`.
pub fn refuse_local_memory(kernels: &[Kernel], source: &str) -> Result<(), String> {
    let allowed = |name: &str| {
        let given =
            source.lines().filter_map(|line| line.trim().strip_prefix("// local memory: ")?.split_once(": "));
        given.into_iter().any(|(kernel, reason)| kernel == name && !reason.trim().is_empty())
    };
    let complaints = kernels.iter().filter(|kernel| kernel.local_bytes > 0 && !allowed(&kernel.name)).map(
        |Kernel { name, local_bytes, registers, .. }| {
            format!(
                "kernel {name} keeps {local_bytes} bytes a thread in local memory ({registers} registers)"
            )
        },
    );
    let complaints: Vec<_> = complaints.collect();
    if complaints.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{}; where that is meant, the source says `// local memory: <kernel>: <reason>`",
        complaints.join("\n")
    ))
}
