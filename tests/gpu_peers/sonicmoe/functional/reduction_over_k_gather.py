"""Its sums over a token's rows tune themselves too; nothing here is made of Triton."""
