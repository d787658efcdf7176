marlinq_add_cpu_isa(NAME avx512_vnni PROCESSORS "x86_64|AMD64"
  FLAGS -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512)
